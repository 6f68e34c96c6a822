"""Storyland's tokenizer: byte-level BPE trained on the corpus, committed as tokenizer.json."""

from __future__ import annotations

import hashlib
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_jax.data.storyland.corpus import documents

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

EOS, PAD = "<|endoftext|>", "<|pad|>"
VOCAB_SIZE = 1152
TRAINING_DOCUMENTS = 40_000


def assets() -> Path:
    """The folder with the committed tokenizer and base models, inside the installed package."""
    return Path(str(resources.files("rlhf_jax.data.storyland"))) / "assets"


def train_tokenizer() -> PreTrainedTokenizerFast:
    """Trains byte-level BPE on the first documents of the corpus.

    Nearly every word of storyland becomes one token.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    # Without a prefix space a text is encoded as it is, at the start of a response as elsewhere.
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[EOS, PAD],
        # All 256 bytes are tokens, so that any text of a user can be encoded.
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(documents(0, TRAINING_DOCUMENTS), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=EOS,
        pad_token=PAD,
        # Otherwise decoding would drop spaces before punctuation, and texts would not round-trip.
        clean_up_tokenization_spaces=False,
        model_max_length=256,
    )


def corpus_fingerprint(count: int = 1000) -> str:
    """sha256 of the first `count` documents.

    A test compares it with the corpus that the base models were pretrained on.
    """
    return hashlib.sha256("\0".join(documents(0, count)).encode()).hexdigest()
