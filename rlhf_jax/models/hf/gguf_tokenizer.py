"""The tokenizer that a GGUF file describes in its own fields."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from rlhf_jax.data.special_ids import set_folder_end_ids

_CONTROL, _USER_DEFINED = 3, 4
"""Types in ``tokenizer.ggml.token_type``: control tokens, and tokens found before the merges."""
_SPECIAL_TOKENS = {
    "bos_token": "bos",
    "eos_token": "eos",
    "unk_token": "unknown",
    "pad_token": "padding",
}
"""transformers' name of a special token -> its name in a GGUF file."""


def gguf_tokenizer(reader: Any) -> Any:
    """The byte-level BPE tokenizer that a GGUF file describes.

    Args:
      reader: a `gguf.GGUFReader`.

    Returns:
      A tokenizer of transformers; None if the file describes one of another kind.

    Raises:
      ValueError: the description contradicts itself.
    """

    def field(name: str) -> Any:
        entry = reader.get_field(f"tokenizer.ggml.{name}")
        return None if entry is None else entry.contents()

    # "gpt2" is GGUF's word for byte-level BPE, whatever the model is; "llama" is SentencePiece.
    if field("model") != "gpt2":
        return None
    import tokenizers
    import transformers  # slow to import, 60 MB large, and needed only here
    from tokenizers import decoders, models, pre_tokenizers

    # How text is split before the merges: as in GPT-2, and for SmolLM first into single digits.
    cuts = {"gpt-2": [], "smollm": [pre_tokenizers.Digits(individual_digits=True)]}
    if field("pre") not in cuts:
        return None
    pieces, kinds, merges = field("tokens"), field("token_type"), field("merges")
    # Byte-level pieces contain no space (it is written as another character), so a space separates
    # the two halves.
    merges = [tuple(merge.split(" ")) for merge in merges or ()]
    # 1 is an ordinary token.
    kinds = kinds or [1] * len(pieces)
    if not len(pieces) == len(kinds) == len(set(pieces)):
        raise ValueError(
            f"the tokenizer of the GGUF file has {len(pieces)} tokens, {len(set(pieces))} of them "
            f"different, and {len(kinds)} types: copy the file again, or put the model's "
            "tokenizer.json beside it"
        )
    try:
        inner = tokenizers.Tokenizer(
            models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=merges)
        )
    except Exception as error:
        # The Rust library raises a bare Exception if a merge gives a piece that is not a token.
        raise ValueError(
            f"the tokenizer of the GGUF file cannot be read ({error}): copy the file again"
        ) from error
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [*cuts[field("pre")], pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    inner.decoder = decoders.ByteLevel()
    control = [piece for piece, kind in zip(pieces, kinds, strict=True) if kind == _CONTROL]
    inner.add_special_tokens(
        [tokenizers.AddedToken(piece, normalized=False, special=True) for piece in control]
    )
    own = [piece for piece, kind in zip(pieces, kinds, strict=True) if kind == _USER_DEFINED]
    inner.add_tokens(
        [tokenizers.AddedToken(piece, normalized=False, special=False) for piece in own]
    )
    _add_ends(inner, pieces, field)
    ids = {name: field(f"{part}_token_id") for name, part in _SPECIAL_TOKENS.items()}
    template = reader.get_field("tokenizer.chat_template")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner,
        # True would delete spaces before punctuation, so that decoded text encodes to other ids.
        clean_up_tokenization_spaces=False,
        chat_template=template and template.contents(),
        **{name: pieces[i] for name, i in ids.items() if i is not None},
    )
    end_of_turn = field("eot_token_id")
    if end_of_turn is not None and end_of_turn != ids["eos_token"]:
        set_folder_end_ids(tokenizer, (int(end_of_turn),))
    return tokenizer


def _add_ends(inner: Any, pieces: Sequence[str], field: Callable[[str], Any]) -> None:
    """Add BOS and EOS around a text, if the file's add_bos_token and add_eos_token are true."""
    from tokenizers import processors

    ends = {}
    for name in ("bos", "eos"):
        i = field(f"{name}_token_id")
        if field(f"add_{name}_token"):
            if i is None or i >= len(pieces):
                raise ValueError(
                    f"tokenizer.ggml.add_{name}_token is true in the GGUF file, and "
                    f"{name}_token_id is {i}: copy it again, or put the model's tokenizer.json "
                    "beside it"
                )
            ends[name] = (pieces[i], i)
    if ends:
        before, after = (f"{ends[name][0]}:0" if name in ends else "" for name in ("bos", "eos"))
        single = [part for part in (before, "$A:0", after) if part]
        inner.post_processor = processors.TemplateProcessing(
            single=single, special_tokens=[*dict(ends.values()).items()]
        )
