"""Reads a sentencepiece model into a tokenizer of the tokenizers library, with the ids of sentencepiece's own code.

transformers converts one too, but not every version of it keeps the model's own settings: 5.17 leaves out the space in
front of a text. So a tokenizer's ids are compared with sentencepiece's when a model is read.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

UNIGRAM, BPE = 1, 2  # TrainerSpec.ModelType in sentencepiece_model.proto
NORMAL, CONTROL, USER_DEFINED = 1, 3, 4  # ModelProto.SentencePiece.Type
SPACE = "▁"
PROBE = "The cat's 12 größte  Katzen, 日本語 🙂: f(x) = x\nAnd then?"  # no special token, and no space in front


def read_sentencepiece(path: Path, *, legacy: bool = True) -> tuple[Any, Any]:
    """The tokenizer of a sentencepiece model, which adds no special tokens, and the model itself.

    Args:
        path: The model, whose pieces are numbered from 0.
        legacy: Whether text behind a special token begins with a space too, as transformers' setting of this name.

    Raises:
        ValueError: when the file is no model, or has settings that the tokenizers library cannot follow.
    """
    from sentencepiece import sentencepiece_model_pb2

    messages: Any = sentencepiece_model_pb2  # its classes are made when it is imported
    model = messages.ModelProto.FromString(path.read_bytes())
    if not model.pieces:
        raise ValueError(f"{path.name} has no pieces")
    tokenizer = _converted(model, legacy)
    if not splits_as(tokenizer, path):
        raise ValueError(f"{path.name} has settings that the tokenizers library cannot follow")
    return tokenizer, model


def splits_as(tokenizer: Any, path: Path) -> bool:
    """Whether a tokenizer gives a text the ids that sentencepiece's own code gives it."""
    from sentencepiece import SentencePieceProcessor

    expected = SentencePieceProcessor(model_proto=path.read_bytes()).encode(PROBE)
    return bool(tokenizer.encode(PROBE, add_special_tokens=False).ids == expected)


def take_over(tokenizer: Any, source: Any) -> None:
    """Make a tokenizer split text as another one does; its special tokens stay."""
    tokenizer.model = source.model
    tokenizer.normalizer = source.normalizer
    tokenizer.pre_tokenizer = source.pre_tokenizer
    tokenizer.decoder = source.decoder


def _converted(model: Any, legacy: bool) -> Any:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers

    rules, prefix = model.normalizer_spec, model.normalizer_spec.add_dummy_prefix
    user_defined = [piece.piece for piece in model.pieces if piece.type == USER_DEFINED]
    tokenizer = Tokenizer(_pieces(model, bool(user_defined)))

    normal: list[Any] = []
    if rules.precompiled_charsmap:
        normal.append(normalizers.Precompiled(rules.precompiled_charsmap))
    if rules.remove_extra_whitespaces:
        normal += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if prefix and legacy:
        normal.append(normalizers.Prepend(" "))
    tokenizer.normalizer = normalizers.Sequence([*normal, normalizers.Replace(" ", SPACE)])

    splits: list[Any] = []
    if prefix and not legacy:
        splits.append(pre_tokenizers.Metaspace(SPACE, prepend_scheme="first", split=False))
    if user_defined:  # never merged with what is beside them
        words = "|".join(re.escape(word) for word in sorted(user_defined, key=len, reverse=True))
        splits.append(pre_tokenizers.Split(Regex(words), "isolated"))
    if splits:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(splits)

    first = [decoders.Strip(content=" ", left=1)] if prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *first]
    )
    special = [piece.piece for piece in model.pieces if piece.type == CONTROL]
    tokenizer.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in special])
    return tokenizer


def _pieces(model: Any, whole_pieces: bool) -> Any:
    """The algorithm that chooses pieces; ``whole_pieces``: a word that is one piece is not split at all."""
    from tokenizers import models

    spec, pieces = model.trainer_spec, model.pieces
    if spec.model_type == UNIGRAM:
        scores = [(piece.piece, piece.score) for piece in pieces]
        return models.Unigram(scores, unk_id=spec.unk_id, byte_fallback=spec.byte_fallback)
    if spec.model_type != BPE:
        raise ValueError(f"model type {spec.model_type} is neither BPE nor unigram")
    ids = {piece.piece: number for number, piece in enumerate(pieces)}
    return models.BPE(
        vocab=ids,
        merges=_merges({piece.piece: piece.score for piece in pieces if piece.type == NORMAL}, ids),
        unk_token=pieces[spec.unk_id].piece,
        fuse_unk=True,
        byte_fallback=spec.byte_fallback,
        ignore_merges=whole_pieces,
    )


def _merges(scores: dict[str, float], ids: dict[str, int]) -> list[tuple[str, str]]:
    """Each way to make a piece of two others, the piece of the highest score first, then the smallest id."""
    ways = (
        (-score, ids[piece], ids[piece[:cut]], ids[piece[cut:]])
        for piece, score in scores.items()
        for cut in range(1, len(piece))
        if piece[:cut] in scores and piece[cut:] in scores
    )
    names = list(ids)
    return [(names[left], names[right]) for _, _, left, right in sorted(ways)]
