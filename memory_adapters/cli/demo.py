"""`memory-adapters demo`."""

from __future__ import annotations

from memory_adapters.cli.messages import wrong
from memory_adapters.cli.run import Run
from memory_adapters.demo.choices import AUTO, choices
from memory_adapters.demo.teaching import Teaching

__all__ = ["serve_page"]


def serve_page(run: Run, model: str, *, method: str, port: int | None, share: bool, dtype: str) -> None:
    """Serve the page until Ctrl-C."""
    if method not in (known := [AUTO, *choices()]):
        raise wrong("--method", f"{method!r} is no method; give one of {', '.join(known)}.")
    try:
        from memory_adapters.demo.page import LOOK, make_page
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        raise ModuleNotFoundError(
            'The page needs gradio: run `pip install "memory-adapters[demo]"`.', name="gradio"
        ) from None
    page = make_page(Teaching(*run.load_model(model, dtype)), method, files=not share)
    page.launch(server_name="127.0.0.1", server_port=port, share=share, ssr_mode=False, **LOOK)
