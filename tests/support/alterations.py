"""How a saved file is altered: its bytes, its JSON, its safetensors header."""

from __future__ import annotations

import json
import pickle
import random
import re
from typing import Any


class Evil:
    """Pickled, it is a call."""

    def __reduce__(self) -> Any:
        return print, ("a pickle was loaded",)


class Raw(str):
    """Text that stands in JSON as it is."""


VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 4, 0.5, -0.0, 1e308, "", "a", "model", "layers", "../../x", "/etc/passwd", "~/x",
    "C:\\x", "\x00", "a\nb", "💥", "x" * 100_000, "(a+)+$", "gelu", "xielu", "keys", "mean", "alphaedit", [], {}, [[]],
    [0], [1, 2], [1, 1], [0.2, 0.4], [0.9, 0.1], [1.5], ["q_proj"], ["model.layers.0.self_attn.q_proj"] * 300,
    [None], [-1],
    ["../x"], list(range(50_000)), [[0, 1_000_000]], {"a": 1}, {"a": {"b": {}}},
    {"prompt": "a", "subject": "a", "target": "b"},
    [{"prompt": "a b", "subject": "a", "target": "b"}] * 2, [{}], {"_target_": "os.system"}, 1 << 31, 1 << 53, 1 << 63,
    (1 << 64) - 1, -(1 << 63), "LORA", "MEMIT", "MEMORY_SLOTS", "MEMORY_ADAPTER", "PROMPT_TUNING", "XLORA", "CAUSAL_LM",
    "pissa", "__base__", "..", ".", "a/b", "F64", "F32", "BF16", "I64", "BOOL", "F8_E4M3", "F4", "C64",
    Raw("NaN"), Raw("Infinity"), Raw("-Infinity"), Raw("1e999"), Raw("1" + "0" * 400), Raw("1" * 5000),
    Raw('"\\ud800"'),
    Raw("[" * 100 + "]" * 100), Raw("[" * 5000 + "]" * 5000), Raw('{"a":' * 1000 + "1" + "}" * 1000),
    Raw("[" + "[]," * 30_000 + "0]"),
    Raw("1.0"), Raw("1E2"), Raw("-0"), Raw("01"), Raw("0x10"), Raw("'a'"), Raw("nul"), Raw(""), Raw("[1,]"), Raw("1 1"),
]  # fmt: skip
NAMES = [
    "auto_map", "auto_mapping", "_target_", "trust_remote_code", "__class__", "__proto__", "megatron_core", "layer.-1",
    "megatron_config", "layer_replication", "init_lora_weights", "loftq_config", "rank_pattern", "modules_to_save",
    "target_modules", "peft_type", "self", "cls", "kwargs", "file_format", "layers_path", "base_model_name_or_path",
    "revision", "", "a.b", "../x", "💥", "__metadata__", "sha256", "edit", "slots", "covariance", "layer.01",
    "layer. 1", "layer.١", "layer.1.0",
]  # fmt: skip


def dumps(value: Any) -> str:
    """JSON, with `Raw` text as it is."""
    raw: list[str] = []

    def marked(inner: Any) -> Any:
        if isinstance(inner, Raw):
            raw.append(str(inner))
            return f"@@{len(raw) - 1}@@"
        if isinstance(inner, dict):
            return {key: marked(v) for key, v in inner.items()}
        return [marked(v) for v in inner] if isinstance(inner, list) else inner

    text = json.dumps(marked(value))
    return re.sub(r'"@@(\d+)@@"', lambda found: raw[int(found[1])], text)


def altered_tree(value: Any, choose: random.Random) -> Any:
    """A JSON value with one place in it changed."""
    if not isinstance(value, dict | list) or not value or choose.random() < 0.15:
        return choose.choice(VALUES)
    copied: Any = value.copy()
    keys = list(value) if isinstance(value, dict) else range(len(value))
    key, what = choose.choice(keys), choose.random()
    if what < 0.1:
        del copied[key]
    elif what < 0.2 and isinstance(copied, dict):
        copied[choose.choice([*NAMES, *keys])] = choose.choice(VALUES)
    elif what < 0.25 and isinstance(copied, dict):
        copied[choose.choice([*NAMES, f"{key} "])] = copied.pop(key)
    elif what < 0.3:
        copied[key] = value[choose.choice(keys)]
    elif what < 0.35 and isinstance(copied, list) and len(copied) < 100:
        copied *= choose.choice([2, 3, 1000])
    else:
        copied[key] = altered_tree(value[key], choose)
    return copied


def altered_json(data: bytes, choose: random.Random) -> bytes:
    """A JSON file with one to three places changed; now and then a name stands twice, or the text is cut."""
    value = json.loads(data)
    for _ in range(choose.choice([1, 1, 2, 3])):
        if isinstance(value, dict | list) and not isinstance(value, Raw):
            value = altered_tree(value, choose)
    text = dumps(value)
    if choose.random() < 0.05 and text.startswith("{"):
        text = "{" + f'"{choose.choice(["peft_type", "layers", *NAMES])}": 1, ' + text[1:]
    return text.encode("utf-8", "surrogatepass")


def altered_tensors(data: bytes, choose: random.Random) -> bytes:
    """A safetensors file with another header: names, dtypes, shapes, offsets, length, metadata; or other numbers."""
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    what = choose.random()
    meta = header.setdefault("__metadata__", {})
    if choose.random() < 0.7:
        meta.pop("sha256", None)  # so that what follows the check of the hash is reached
    if choose.random() < 0.5:
        meta.pop("edit", None)
    if what < 0.25:  # numbers
        start = choose.randrange(0, max(len(body) - 8, 1))
        number = choose.choice(
            [b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"\xff\xff\x7f\x7f", b"\xff" * 8, b"\xff" * 7 + b"\x7f"]
        )
        body = body[:start] + number + body[start + len(number) :]
    elif what < 0.4:  # metadata that is JSON itself
        texts = [key for key in ("slots", "covariance") if key in meta]
        if texts:
            meta[texts[0]] = altered_json(meta[texts[0]].encode(), choose).decode("utf-8", "replace")
        else:
            header["__metadata__"] = altered_tree(meta, choose)
    elif what < 0.6:  # a tensor's entry
        name = choose.choice([key for key in header if key != "__metadata__"])
        entry = dict(header[name])
        field = choose.choice(["dtype", "shape", "data_offsets"])
        if field == "dtype" or choose.random() < 0.3:
            entry[field] = choose.choice(VALUES)
        else:
            listed = list(entry[field]) or [0]
            sizes = [0, 1, -1, 1 << 31, 1 << 62, 1 << 63, len(body), len(body) + 1, 0.5, None]
            listed[choose.randrange(len(listed))] = choose.choice(sizes)
            entry[field] = choose.choice([listed, [*listed, 1], listed[:-1], listed[::-1]])
        header[name] = entry
    elif what < 0.7:  # names
        names = [key for key in header if key != "__metadata__"]
        name, other = choose.choice(names), choose.choice([*names, *NAMES])
        header[other] = header[name] if choose.random() < 0.5 else header.pop(name)
    elif what < 0.85:
        header = altered_tree(header, choose)
    text = dumps(header).encode("utf-8", "surrogatepass")
    if what > 0.95:  # a name twice
        text = b'{"extra":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},' + text[1:]
        text = text.replace(b'"extra"', b'"__metadata__"', 1) if choose.random() < 0.5 else b'{"extra":1,' + text[1:]
    size = len(text)
    if 0.85 < what < 0.95:
        size = choose.choice(
            [0, 1, size - 1, size + 1, len(body) + size, 1 << 24, 1 << 31, (1 << 63) - 1, (1 << 64) - 1]
        )
    return size.to_bytes(8, "little") + text + body


def altered_bytes(data: bytes, choose: random.Random) -> bytes:
    """Bits turned over, parts cut out, doubled, zeroed, or something else altogether."""
    changed, what = bytearray(data), choose.random()
    if what < 0.5 and data:
        for _ in range(choose.choice([1, 1, 2, 8])):
            changed[choose.randrange(len(data))] ^= 1 << choose.randrange(8)
    elif what < 0.65:
        del changed[choose.randrange(len(data) + 1) :]
    elif what < 0.75:
        a, b = sorted(choose.randrange(len(data) + 1) for _ in range(2))
        changed[a:b] = choose.choice([b"", changed[a:b] * 2, bytes(b - a), choose.randbytes(16)])
    elif what < 0.85:
        changed += choose.choice([b"\0", b" ", b"\n{}", choose.randbytes(100), bytes(4096)])
    else:
        others = [b"", b"{}", b"[]", b"null", b"\xef\xbb\xbf{}", b"\xff\xfe{\0}\0", bytes(64), choose.randbytes(256)]
        others += [pickle.dumps(Evil(), protocol) for protocol in (0, 2, 5)] + [
            b"PK\x03\x04" + bytes(60),
            b"GGUF" + bytes(60),
        ]
        changed = bytearray(choose.choice(others))
    return bytes(changed)


def altered_file(name: str, data: bytes, choose: random.Random) -> bytes:
    """Another file in place of one of this name."""
    if choose.random() < 0.25:
        return altered_bytes(data, choose)
    if name.endswith(".jsonl"):
        lines = data.split(b"\n")
        at = choose.randrange(len(lines))
        lines[at] = altered_json(lines[at], choose)
        return b"\n".join(lines)
    return (altered_json if name.endswith(".json") else altered_tensors)(data, choose)
