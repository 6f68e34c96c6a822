"""Curation of prompts and labels before a stage reads them, and tables that describe a data set.

Pure functions on the records of `rlhf_jax.data.schema`: removal of near-duplicates, a cap per user,
splits that share no user, a check for leaks between them, a hook for personal data, languages,
examples from few-shot instructions. A record may name the author of its prompt (fields `user`,
`organization`); one that does not is grouped by its conversation, that is, by its first human turn.
Functions that drop records also return a `DataReport`.

Source: Ouyang et al. 2022, arXiv 2203.02155, sections 3.2 and 3.3 and appendix A.
"""

from rlhf_jax.data.curation.few_shot import few_shot_examples, few_shot_subsets
from rlhf_jax.data.curation.languages import default_identifier, language_share
from rlhf_jax.data.curation.leaks import Leak, check_leakage, leakage, without_leaks
from rlhf_jax.data.curation.personal_data import mask_identifiers, scrub
from rlhf_jax.data.curation.selection import cap_per_user, drop_long_common_prefix, split_by
from rlhf_jax.data.curation.tables import KINDS, data_tables
from rlhf_jax.data.curation.texts import first_turn, normalise, prompt_text

__all__ = [
    "KINDS",
    "Leak",
    "cap_per_user",
    "check_leakage",
    "data_tables",
    "default_identifier",
    "drop_long_common_prefix",
    "few_shot_examples",
    "few_shot_subsets",
    "first_turn",
    "language_share",
    "leakage",
    "mask_identifiers",
    "normalise",
    "prompt_text",
    "scrub",
    "split_by",
    "without_leaks",
]
