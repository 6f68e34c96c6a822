r"""Turns texts into rows of tokens: templates, tokenisation, masks and packing.

This package alone defines how text becomes ids, for every stage, scorer and export. A prompt is a
text or the turns of a conversation. The template of a text: the prompt is its text and ``"\n\n"``;
the response is its text and EOS. `chat` encodes conversations. A prompt, a document and any other
beginning of a row starts with what the tokenizer's own post-processor puts there (`begin_ids`: BOS,
or nothing), once; a response never does. Prompt and response are tokenised separately and their ids
concatenated, for SFT, reward model and PPO alike, so that a response has the same ids everywhere.
Rows are contiguous from the left and padded on the right; masks are made from lengths and roles,
never from ids.

Row functions never truncate or drop anything: what does not fit is an error. `drop_too_long` leaves
such items out beforehand, and counts them.
"""

from rlhf_jax.data.special_ids import begin_ids
from rlhf_jax.data.text.encoding import (
    PROMPT_END,
    Ids,
    MaskedIds,
    decode_answer,
    decode_response,
    encode_answer,
    encode_demonstration,
    encode_document,
    encode_opening,
    encode_prompt,
    encode_response,
    end_of_turn_id,
    exported_end_ids,
    stop_ids,
)
from rlhf_jax.data.text.packing import best_fit, drop_too_long, padding_share
from rlhf_jax.data.text.rows import (
    RankedIds,
    lm_rows,
    masked_rows,
    prompt_batch,
    ranking_batch,
    ranking_rows,
    sft_rows,
)
from rlhf_jax.data.text.tokenizer import (
    check_same_tokenizer,
    load_tokenizer,
    open_tokenizer,
    tokenizer_fingerprint,
)

__all__ = [
    "PROMPT_END",
    "Ids",
    "MaskedIds",
    "RankedIds",
    "begin_ids",
    "best_fit",
    "check_same_tokenizer",
    "decode_answer",
    "decode_response",
    "drop_too_long",
    "encode_answer",
    "encode_demonstration",
    "encode_document",
    "encode_opening",
    "encode_prompt",
    "encode_response",
    "end_of_turn_id",
    "exported_end_ids",
    "lm_rows",
    "load_tokenizer",
    "masked_rows",
    "open_tokenizer",
    "padding_share",
    "prompt_batch",
    "ranking_batch",
    "ranking_rows",
    "sft_rows",
    "stop_ids",
    "tokenizer_fingerprint",
]
