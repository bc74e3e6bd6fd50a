"""The process that a pretrained text encoder lives in: texts on standard input, embeddings in a file, and it ends.

``python -m pavdm_dist.codecs.encode_texts`` is started by :mod:`pavdm_dist.codecs.pretrained_text`.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from pavdm_dist.codecs.pretrained_text import BAD_SETTINGS, imported
from pavdm_dist.errors import ConfigError
from pavdm_dist.models.devices import DTYPES, check_dtype, choose_device

# Beside the weights a GPU must have room for what they compute.
_ROOM = 1.2


def encode_texts(order: dict[str, Any]) -> dict[str, Tensor]:
    """Embeddings by number, ``[L, d_model]`` without padding, on the CPU, in the type that was asked for.

    Args:
        order: ``encoder`` and ``tokenizer`` (folders), ``texts``, ``max_length``, ``device``, ``dtype``.

    Raises:
        ConfigError: a package is missing, or the device cannot.
    """
    transformers = imported("transformers")
    dtype = DTYPES[order["dtype"]]
    tokenizer = transformers.AutoTokenizer.from_pretrained(order["tokenizer"])
    config = transformers.AutoConfig.from_pretrained(order["encoder"])
    kind = transformers.UMT5EncoderModel if config.model_type == "umt5" else transformers.T5EncoderModel
    model = kind.from_pretrained(order["encoder"], dtype=dtype).eval()
    device = _device(order["device"], sum(value.nbytes for value in model.parameters()))
    check_dtype("text_dtype", order["dtype"], device)
    model.to(device)
    found = {}
    for number, text in enumerate(order["texts"]):
        # Padded to one length, as the models that read them were trained: a text's rows do not depend on others.
        tokens = tokenizer(
            text, padding="max_length", max_length=order["max_length"], truncation=True, return_tensors="pt"
        )
        mask = tokens["attention_mask"]
        with torch.inference_mode():
            rows = model(tokens["input_ids"].to(device), attention_mask=mask.to(device)).last_hidden_state[0]
        found[str(number)] = rows[: int(mask.sum())].to("cpu", dtype).contiguous()
    return found


def _device(name: str, size: int) -> torch.device:
    device = choose_device(name, "text_device")
    if device.type == "cuda" and torch.cuda.mem_get_info(device)[0] < _ROOM * size:
        if name == "auto":
            return torch.device("cpu")
        raise ConfigError(f"text_device={name}: the GPU has no room for {size / 2**30:.1f} GiB; use text_device=cpu")
    return device


def main() -> None:
    """Reads the order as JSON and writes the embeddings; what went wrong is the last line of standard error."""
    order = json.load(sys.stdin)
    try:
        save_file(encode_texts(order), order["output"])
    except ConfigError as error:
        sys.exit(_ended(error, BAD_SETTINGS))
    except Exception as error:  # whatever the library raises belongs to the checkpoint
        sys.exit(_ended(error, 1))


def _ended(error: Exception, status: int) -> int:
    sys.stderr.write(f"\n{' '.join(str(error).split()) or type(error).__name__}\n")
    return status


if __name__ == "__main__":
    main()
