"""`python -m memory_adapters`, the same as `memory-adapters`."""

from memory_adapters.cli import main

main()
