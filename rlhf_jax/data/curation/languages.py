"""The languages of texts."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterable


def language_share(
    texts: Iterable[str], identify: Callable[[str], str] | None = None
) -> dict[str, float]:
    """Share of the texts in each language, the most frequent first; ties are sorted by name.

    Args:
      texts: prompts, for example.
      identify: returns the language code of a text; None = py3langid.

    Raises:
      ValueError: py3langid is needed and not installed.

    Source: Ouyang et al. 2022, section 3.3 and appendix A.4 (96% English by langid.py).

    >>> language_share(["a", "b", "c"], lambda text: "en" if text < "c" else "de")
    {'en': 0.6666666666666666, 'de': 0.3333333333333333}
    """
    identify = identify or default_identifier()
    counts = collections.Counter(map(identify, texts))
    return {
        name: n / counts.total()
        for name, n in sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    }


def default_identifier() -> Callable[[str], str]:
    """The language identification of py3langid.

    Raises:
      ValueError: it is not installed; the message names the extra to install.
    """
    try:
        import py3langid
    except ImportError:
        raise ValueError(
            "languages are told apart by py3langid, which is not installed: pip install "
            "'rlhf_jax[languages]'"
        ) from None
    return lambda text: py3langid.classify(text)[0]
