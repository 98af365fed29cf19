"""Damaged ``.pth`` and ``.bin`` files: odd objects, code, both formats of torch.save, and any byte of them."""

from __future__ import annotations

import io
import pickle
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from random import Random
from typing import Any

import numpy as np
import torch

from . import bases
from .configs import hugging_face, meta
from .folder import Files
from .json_edits import broken_text, odd_value
from .kinds import Base, Kind

Tensors = dict[str, torch.Tensor]


class RunsCode:
    """An object whose pickle calls a function when it is loaded."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self._call = (function, arguments)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self._call


def _odd_tensor(tensor: torch.Tensor, rng: Random) -> Any:
    """The tensor in a form that a checkpoint does not have."""
    forms: list[Callable[[], Any]] = [
        lambda: torch.tensor(1.0),
        lambda: torch.zeros(0),
        lambda: tensor.to_sparse(),
        lambda: tensor.to("meta"),
        lambda: torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8),
        lambda: tensor.to(torch.complex64),
        lambda: tensor > 0,
        lambda: tensor.to(
            rng.choice((torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.int64, torch.uint8))
        ),
        lambda: tensor.to(torch.float8_e5m2),
        lambda: torch.nn.Parameter(tensor),
        lambda: tensor.clone().requires_grad_(),
        lambda: tensor.t() if tensor.dim() == 2 else tensor[None],
        lambda: tensor[..., ::2],
        lambda: tensor.flatten()[:1].expand(tensor.shape),
        lambda: torch.zeros(1).expand(10**9, 10**9),
        lambda: torch.full_like(tensor, rng.choice((float("nan"), float("inf"), 1e30, 0.0))),
        lambda: torch.nested.nested_tensor([tensor.flatten(), tensor.flatten()[:2]]),
        lambda: tensor.numpy(),
        lambda: np.float32(1.0),
        lambda: odd_value(rng),
        lambda: tensor.to_mkldnn(),
        lambda: torch.empty(0, 2**40),
        lambda: tensor.to_sparse_csr() if tensor.dim() == 2 else tensor[None, None],
        lambda: tensor.conj() if tensor.is_complex() else torch.view_as_real(tensor.to(torch.complex64)),
        lambda: tensor.untyped_storage(),
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return rng.choice(forms)()


def _odd_object(tensors: Tensors, rng: Random) -> Any:
    """The whole in a form that a checkpoint does not have."""
    name = rng.choice(sorted(tensors))
    itself: dict[str, Any] = dict(tensors)
    itself["self"] = itself
    forms: list[Callable[[], Any]] = [
        lambda: {"state_dict": tensors},
        lambda: {"model": tensors, "epoch": 3},
        lambda: OrderedDict(tensors),
        lambda: list(tensors.values()),
        lambda: None,
        lambda: {},
        lambda: {f"module.{key}": value for key, value in tensors.items()},
        lambda: {key: value for key, value in tensors.items() if key != name},
        lambda: {**tensors, 7: tensors[name]},
        lambda: {**tensors, "x" * 5000: tensors[name]},
        lambda: {**tensors, "rope.freqs": torch.ones(4), "layers.0.attention.inner_attention.rope.freqs": name},
        lambda: {**tensors, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)},
        lambda: {**tensors, name: tensors[name], "surplus": 3, "nothing": None},
        lambda: {**tensors, "code": RunsCode(open, "canary", "w")},
        lambda: RunsCode(exec, "open('canary', 'w')"),
        lambda: {**tensors, name: RunsCode(eval, "__import__('os').system('touch canary')")},
        lambda: {**tensors, name: RunsCode(getattr, torch, "ones")},
        lambda: itself,
        lambda: torch.nn.Linear(2, 2),
        lambda: dict.fromkeys(tensors, 1),
    ]  # fmt: skip
    return rng.choice(forms)()


def _bomb(levels: int) -> list[Any]:
    """A list of lists of ... of the same list: small as a pickle, 2 ** levels items when it is walked."""
    value: list[Any] = []
    for _ in range(levels):
        value = [value, value]
    return value


def object_edit(files: Files, rng: Random) -> str:
    """Save another object in place of a file's tensors."""
    name = rng.choice([name for name in files if name.endswith((".pth", ".bin"))])
    tensors = dict(bases.meta_tensors() if name.endswith(".pth") else bases.hugging_face_tensors())
    value: Any = tensors
    if rng.random() < 0.5:
        key = rng.choice(sorted(tensors))
        value = {**tensors, key: _odd_tensor(tensors[key], rng)}
        what = f"{key} is {_kind(value[key])}"
    elif rng.random() < 0.95:
        value = _odd_object(tensors, rng)
        what = f"another object: {_kind(value)}"
    else:
        value, what = {**tensors, "bomb": _bomb(rng.choice((10, 40)))}, "a list that doubles"
    legacy = rng.random() < 0.4
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            files[name] = bases.pickled(value, legacy=legacy)
    except Exception as error:  # noqa: BLE001 - torch cannot save every object
        return f"nothing: {type(error).__name__}"
    return f"{name}: {what}{', legacy' if legacy else ''}"


def _kind(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{value.layout} {value.dtype} {'meta ' if value.is_meta else ''}tensor"
    return type(value).__name__


def zip_edit(files: Files, rng: Random) -> str:
    """Change one member of a zip file, whose check sums then are right again."""
    name = rng.choice([name for name in files if name.endswith((".pth", ".bin"))])
    content = files[name]
    assert isinstance(content, bytes)
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            members = {member: archive.read(member) for member in archive.namelist()}
    except Exception:  # noqa: BLE001 - a legacy file, or one that an earlier edit broke
        files[name], what = broken_text(content, rng)
        return f"{name}: {what}"
    if not members:
        return "nothing"
    member = rng.choice(
        [rng.choice(list(members)), next((m for m in members if m.endswith("data.pkl")), next(iter(members)))]
    )
    pick = rng.random()
    if pick < 0.65:
        members[member], what = broken_text(members[member], rng)
    elif pick < 0.75:
        del members[member]
        what = "taken out"
    elif pick < 0.85:
        new = rng.choice((member.upper(), "../" + member, member + "x", "x" * 300, "/" + member))
        members[new] = members.pop(member)
        what = f"called {new:.40}"
    elif pick < 0.93:
        members[member], what = rng.choice(HAND_WRITTEN), "a pickle written by hand"
    else:
        members[member], what = bytes(10**7), "ten million zeros"
    stream = io.BytesIO()
    method = zipfile.ZIP_DEFLATED if rng.random() < 0.2 else zipfile.ZIP_STORED
    with zipfile.ZipFile(stream, "w", method) as archive:
        for key, value in members.items():
            archive.writestr(key, value)
    files[name] = stream.getvalue()
    return f"{name}: {member} {what}{', compressed' if method else ''}"


HAND_WRITTEN = (
    b"",
    b".",
    b"\x80\x02}.",
    b"\x80\x02N.",
    b"\x80\x02K\x01.",
    b"\x80\x02]q\x00h\x00a.",  # a list that holds itself
    b"\x80\x02" + b"(" * 100_000 + b".",
    b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".",
    b"\x80\x02cos\nsystem\nX\x04\x00\x00\x00true\x85R.",
    b"\x80\x02cbuiltins\neval\nX\x01\x00\x00\x001\x85R.",
    b"\x80\x02ctorch\nload\nX\x01\x00\x00\x00x\x85R.",
    b"\x80\x02X\xff\xff\xff\x7fabc.",
    b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7f.",
    b"\x80\xff.",
    b"\x80\x02\x8b\xff\xff\xff\x7f1.",
    b"\x80\x02r\xff\xff\xff\xff.",
    b"\x80\x02}(X\x01\x00\x00\x00aK\x01u.",
    b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n)R.",
    b"\x80\x02ccollections\nOrderedDict\n)R.",
    pickle.dumps({"a": 10**5000}, 2),
    b"\x80\x02ctorch\nzeros\nM\xff\xff\x85R.",
    b"\x80\x02c__main__\nX\n.",
)


def bytes_edit(files: Files, rng: Random) -> str:
    """Change bytes of a file."""
    name = rng.choice([name for name in files if name.endswith((".pth", ".bin"))])
    content = files[name]
    assert isinstance(content, bytes)
    files[name], what = broken_text(content, rng)
    return f"{name}: {what}"


def _make_bases() -> list[Base]:
    model = {"config.json": bases.hugging_face()["config.json"]}
    weights = bases.hugging_face_tensors()
    return [
        Base("meta", bases.meta(), meta),
        Base("pytorch_model.bin", {**model, "pytorch_model.bin": bases.pickled(weights)}, hugging_face),
        Base("shards", bases.sharded(pickle=True), hugging_face),
    ]


def kinds() -> dict[str, Kind]:
    """The kinds of this file by name."""
    return {"pickle": Kind(_make_bases, [(5, object_edit), (3, zip_edit), (2, bytes_edit)], most_edits=2)}
