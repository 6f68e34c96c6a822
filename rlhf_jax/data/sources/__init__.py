"""Readers of human data: HH-RLHF, OpenAssistant, running text, and other tools' tables and exports.

`read_hh`, `read_oasst` and `read_english` read a folder or download from the hub. `read_pairs`,
`read_completions`, `read_prompts` and `read_rated` read a table of one form; `read_form` recognises
and reads any of `FORMS`. `tables` reads the file formats, `FORM_RULES` lists what happens to a row,
and docs/data_sources.md describes each form.

A dialogue of the public data sets becomes a prompt in one format: "Human: ..", blank line,
"Assistant: ..", and so on, ending in "Assistant:". Train and test are split by a hash of the first
human turn, so no conversation is in both. Tables keep their own splits, and messages remain
messages.
"""

from rlhf_jax.data.sources.oasst import (
    OASST_REPO,
    OASST_TREES,
    read_oasst,
    read_oasst_demonstrations,
)
from rlhf_jax.data.sources.reading import (
    SETS,
    Reading,
    read_completions,
    read_form,
    read_pairs,
    read_prompts,
    read_rated,
)
from rlhf_jax.data.sources.recognise import FORMS, FileForm, advice
from rlhf_jax.data.sources.rules import EXPECTED_DROPS, FORM_RULES
from rlhf_jax.data.sources.running_text import (
    TEXT_ARCHIVE,
    TEXT_FOLDERS,
    TEXT_REPO,
    read_english,
    read_text,
)
from rlhf_jax.data.sources.transcripts import (
    HH_REPO,
    HH_SUBSETS,
    Split,
    best_responses,
    conversation_place,
    dialogue,
    in_test_split,
    read_hh,
)

__all__ = [
    "EXPECTED_DROPS",
    "FORMS",
    "FORM_RULES",
    "HH_REPO",
    "HH_SUBSETS",
    "OASST_REPO",
    "OASST_TREES",
    "SETS",
    "TEXT_ARCHIVE",
    "TEXT_FOLDERS",
    "TEXT_REPO",
    "FileForm",
    "Reading",
    "Split",
    "advice",
    "best_responses",
    "conversation_place",
    "dialogue",
    "in_test_split",
    "read_completions",
    "read_english",
    "read_form",
    "read_hh",
    "read_oasst",
    "read_oasst_demonstrations",
    "read_pairs",
    "read_prompts",
    "read_rated",
    "read_text",
]
