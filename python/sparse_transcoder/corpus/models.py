"""A language model and its tokenizer: a folder, a name of the hub, or a .gguf file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


def load_model(name: str, device: str = "cpu") -> tuple[Any, Any]:
    """(model, tokenizer). On the CPU the model is float32, elsewhere as it is stored.

    Raises:
        ImportError: transformers, or for .gguf the package gguf, is not installed. OSError,
            ValueError: there is no such model.
    """
    try:
        import transformers
    except ImportError:
        raise ImportError(
            "transformers is needed to run a model: pip install sparse_transcoder[corpus]"
        ) from None
    source, options = name, {}
    if name.endswith(".gguf"):
        file = Path(name)
        if not file.is_file():
            raise FileNotFoundError(f"{file}: there is no such file")
        source, options = str(file.parent), {"gguf_file": file.name}
    dtype: Any = torch.float32 if device == "cpu" else "auto"
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    load: Any = transformers.AutoModelForCausalLM.from_pretrained
    try:
        tokenizer: Any = transformers.AutoTokenizer.from_pretrained(source, **options)
        model = load(source, dtype=dtype, **options)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        kind = OSError if isinstance(error, OSError) else ValueError
        raise kind(f"{name}: transformers cannot load this model: {reason}") from None
    return model.eval().to(device), tokenizer
