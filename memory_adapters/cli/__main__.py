"""`python -m memory_adapters.cli`, for launchers that take a module."""

from memory_adapters.cli import main

main()
