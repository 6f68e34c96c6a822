"""Secrets: which names and texts contain one, and how to keep them out of everything written.

A value is a secret for one of two reasons: its *name* (``HF_TOKEN``, ``db_password``,
``DATABASE_URL``) or its *shape*: tokens of well-known services, private keys, the user part of a
URL, a cookie or an authorization header. `is_secret` classifies names, `redact` cleans texts, and
`known_secrets` and `secrets_in` collect the secret values given to this process, so that they are
recognized in a text without their names.

What is not secret must remain readable: a path below the working directory, ``eos_token``,
``max_tokens``. Hence names are compared word by word, never by substrings, and values that are
paths, numbers or plain words are not searched for in texts.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from urllib.parse import quote

REDACTED = "<redacted>"

# -------------------------------------------------------------------------------------------- names


def _set_of(text: str) -> frozenset[str]:
    return frozenset(text.split())


_ALWAYS = _set_of(
    """
    secret secrets password passwords passwd passwds passphrase passcode credential credentials
    creds authorization bearer apikey apikeys apitoken accesskey accesstoken authtoken authkey
    secretkey privatekey sshkey accountkey sharedaccesskey sharedaccesssignature clientsecret dsn
    jwt cookie cookies sessionid sessid phpsessid jsessionid connectionstring connstr mnemonic
    """
)
"""Words that make a value secret wherever they occur in its name."""

_PASSWORD = re.compile(r"passw(or)?d$|passphrase$|passcode$")
"""Endings of words that name a password without a separator: ``PGPASSWORD``, ``sshpass``."""

_ACCOUNTS = _set_of(
    """
    db database mysql mariadb mssql sql sqlserver pg postgres postgresql mongo redis rabbitmq smtp
    mail email imap ftp ldap proxy http https admin root user docker registry vnc sudo git
    """
)
"""Words before ``pass`` and ``pwd`` with which the name is a password's: ``SMTP_PASS``."""

_KEYS = _set_of(
    """
    api access private secret signing sign ssh auth encryption encrypt decryption master account
    storage license licence service deploy app application client consumer subscription webhook
    session hmac jwt rsa pem gpg openai anthropic cohere mistral gemini google gcp azure aws hf
    huggingface hub wandb neptune comet mlflow github gitlab bitbucket stripe sendgrid mailgun
    twilio replicate together groq deepseek pinecone weaviate datadog dd sentry kaggle langchain
    langsmith langfuse serper serpapi tavily elevenlabs runpod modal paperspace cloudflare firebase
    supabase mapbox algolia slack discord telegram notion airtable openrouter perplexity xai
    fireworks deepinfra nvidia ngc voyage jina assemblyai deepgram cerebras
    """
)
"""Words directly before ``key`` with which the name is that of a secret key."""

_OTHER_KEYS = _set_of(
    """
    public sort primary foreign cache partition group hot row map index compose shortcut prng rng
    random
    """
)
"""Words before ``KEY`` in the name of an environment variable that is not a secret key."""

_STORES = _set_of(
    """
    database db redis mongo mongodb postgres postgresql pg mysql mariadb mssql amqp rabbitmq
    cloudamqp broker jdbc sqlalchemy elastic elasticsearch clickhouse neo4j couchdb cassandra celery
    """
)
"""Words before ``url`` and ``uri`` with which the URL usually contains user and password."""

_TOKENS_OF_TEXT = _set_of(
    """
    eos bos pad padding unk unknown sep cls mask stop start end begin beginning special image audio
    video vision next first last new per each every any a of by previous prompt response extra fim
    prefix suffix middle newline turn think boi eoi text added additional word single unused
    reserved decoder separator document space
    """
)
"""Words before ``token`` with which it is a token of text."""

_ABOUT = _set_of(
    """
    id ids type types count counts limit budget length len size level index name names file files
    filename path paths dir dirs directory folder home sock socket host port user username email
    region endpoint method mode version dropout embedding embeddings rate mean loss accuracy weights
    probs logprobs mask min max ttl expiry expires timeout policy regex pattern info mechanism
    scheme agent
    """
)
"""Last words of a name that describes a secret: where it is stored, how long it is."""


def is_secret(key: str) -> bool:
    """Whether a config key, variable, column or header has the name of a secret.

    >>> secret = ("hf_token", "apiKey", "GITHUB_PAT", "MYSQL_PWD", "DATABASE_URL", "Set-Cookie")
    >>> [is_secret(key) for key in secret]
    [True, True, True, True, True, True]
    >>> public = ("PWD", "eos_token", "max_new_tokens", "tokenizer", "key", "SSH_AUTH_SOCK")
    >>> [is_secret(key) for key in public]
    [False, False, False, False, False, False]
    """
    # Keys of a config are dotted; only the last part names the value.
    name = key.rpartition(".")[2]
    words = _words(name)
    # PWD and OLDPWD are folders of the shell, and XDG_SESSION_ID is no secret session.
    if not words or name in ("PWD", "OLDPWD") or words[0] == "xdg":
        return False
    before, last = words[:-1], words[-1]
    if last in _ABOUT:
        # Identifiers may be logged, except those that grant access.
        return last == "id" and (
            before[-1:] in (["session"], ["secret"]) or before[-2:] == ["access", "key"]
        )
    if _ALWAYS & set(words) or any(_PASSWORD.search(word) for word in words):
        return True
    if "token" in words:
        return _is_token(words)
    if last == "tokens" and before:
        return before[-1] in (
            "api",
            "access",
            "auth",
            "refresh",
            "bearer",
            "hf",
            "github",
            "gitlab",
        )
    if "key" in words or "keys" in words:
        return _is_key(name, words)
    if last in ("pass", "pwd") and (
        _ACCOUNTS & set(before) or (last == "pwd" and not name.isupper())
    ):
        return True
    if last in ("pwd", "pat", "auth"):
        return bool(before) or last == "auth" or name.isupper()
    if last in ("url", "uri", "string", "str"):
        return (
            bool(_STORES & set(before))
            or before[-1:] in (["connection"], ["conn"])
            or before[-1:] == ["webhook"]
        )
    return last in ("sshpass", "sig") and len(words) == 1


def _words(name: str) -> list[str]:
    """``hubToken``, ``HUB-TOKEN`` and ``hub_token`` as ``["hub", "token"]``."""
    apart = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name)
    return [word for word in re.split(r"[^A-Za-z0-9]+", apart.lower()) if word]


def _is_token(words: Sequence[str]) -> bool:
    place = len(words) - 1 - list(reversed(words)).index("token")
    if place and words[place - 1] in _TOKENS_OF_TEXT:
        return False
    return place == len(words) - 1 or words[place + 1] in ("secret", "secrets", "value", "default")


def _is_key(name: str, words: Sequence[str]) -> bool:
    """Whether a name with ``key`` in it is that of a secret key.

    It is if a word of `_KEYS` precedes it. An environment variable, in capitals, counts unless a
    word of `_OTHER_KEYS` precedes it.
    """
    for place, word in enumerate(words):
        if word not in ("key", "keys") or place == 0:
            continue
        # A public key may be published.
        if "public" in words[:place]:
            return False
        if words[place - 1] in _KEYS or "".join(words[max(0, place - 2) : place]) in _KEYS:
            return True
        if name.isupper() and place == len(words) - 1 and words[place - 1] not in _OTHER_KEYS:
            return True
    return False


# ------------------------------------------------------------------------------------------- shapes

_SHAPES = re.compile(
    r"""(?<![A-Za-z0-9])(?:
      gh[oprsu]_[A-Za-z0-9]{16,} | github_pat_[A-Za-z0-9_]{16,} | glpat-[\w-]{16,}
    | hf_[A-Za-z0-9]{20,} | api_org_[A-Za-z0-9]{20,}
    | (?<!-)sk-[A-Za-z0-9_-]*[A-Za-z0-9_]{14,}[A-Za-z0-9_-]* | [rsp]k_(?:live|test)_[A-Za-z0-9]{10,}
    | xox[a-z]-[A-Za-z0-9-]{10,} | xapp-[A-Za-z0-9-]{10,} | (?:AKIA|ASIA)[A-Z0-9]{16}(?![A-Za-z0-9])
    | AIza[\w-]{30,} | ya29\.[\w-]{16,} | GOCSPX-[\w-]{16,} | npm_[A-Za-z0-9]{30,} | pypi-[\w-]{50,}
    | dop_v1_[a-f0-9]{32,} | SG\.[\w-]{16,}\.[\w-]{16,} | r8_[A-Za-z0-9]{30,} | gsk_[A-Za-z0-9]{20,}
    | nvapi-[\w-]{20,} | dckr_pat_[\w-]{20,} | hvs\.[\w-]{20,} | lin_api_[A-Za-z0-9]{20,}
    | eyJ[\w-]{8,}\.[\w-]{8,}(?:\.[\w-]*)?
    )""",
    re.VERBOSE,
)
"""Tokens that are recognized by their prefix, as documented by each service."""

_PRIVATE_KEY = re.compile(
    r"-----BEGIN [A-Z0-9 ]{0,40}PRIVATE KEY(?: BLOCK)?-----.*?(?:-----END [A-Z0-9 ]{0,40}-----|\Z)",
    re.DOTALL,
)
_WEBHOOK = re.compile(
    r"(?<=hooks\.slack\.com/services/)[\w/]{10,}|(?<=discord\.com/api/webhooks/)[\w/-]{10,}"
)
# A URL that went through a Path has only one slash left.
_USER_INFO = re.compile(r"(?<=:/)(/?)[^/\s?#]+@")
_HARD_USER_INFO = re.compile(r"(?<=://)[^\s/@:]{1,200}:(?!\d{1,5}[/?#])[^\s@]{1,500}@")
"""A password that contains ``/``, ``?`` or ``#``; digits after the colon are a port."""
_AUTHORIZATION = re.compile(
    r"(?i)(?P<head>\b(?:proxy-)?authorization[\"']?\s{0,4}[:=]\s{0,4}[\"']?)"
    r"(?:[A-Za-z]{2,20} +)?[^\s\"',;]+"
)
_BEARER = re.compile(r"(?i)(?<=bearer )[\w.~+/=-]{8,}")
_BASIC = re.compile(r"(?<=[Bb]asic )(?=[^\s]*[a-z][^\s]*[A-Z]|[^\s]*[\d=])[A-Za-z0-9+/]{8,}={0,2}")
_COOKIE = re.compile(
    r"(?i)(?P<head>\b(?:set-)?cookie[\"']?\s{0,4}[:=]\s{0,4}[\"']?)[\w.$-]+=[^\n\"']*"
)
_SIGNED_URL = re.compile(
    r"(?i)(?<=[?&])(?P<key>sig|signature|key|x-amz-signature|x-goog-signature)=[^\s&\"']+"
)
_VALUE = r"""(?P<value>"[^"\n]*"|'[^'\n]*'|\{[^{}\n]*\}|[^\s&;,)"']+)"""
# A key starts at a boundary, or a long word without "=" would be scanned again from each of its
# letters.
_ASSIGNED = re.compile(r"(?<![\w.-])(?P<key>[\w.-]++)(?P<equals>=)" + _VALUE)
_QUOTED = re.compile(
    r"""(?P<key>["'][\w.-]{1,100}["'])(?P<equals>\s{0,4}:\s{0,4})"""
    r"""(?P<value>"[^"\n]*"|'[^'\n]*'|[\w.+/=-]+)"""
)
_FLAG = re.compile(
    r"(?P<key>(?<!\S)--?[A-Za-z][\w.-]*)(?P<equals>[ ]+)(?P<value>(?![a-z]+(?:\s|$))[^\s-]\S*)"
)
"""A plain word after a flag belongs to a sentence (``--config.hub_token needs a value``)."""

_CONNECTION = re.compile(
    r"(?i)(?P<key>(?<=;)\s?(?:password|pwd|accountkey|sharedaccesskey))(?P<equals>=)(?P<value>[^;\n\"']+)"
)
"""In a connection string a value extends to the next semicolon, blanks included."""


def redact(text: str, secrets: Iterable[str] = ()) -> str:
    """Removes from `text` what is secret by name or shape, and `secrets` in any of their spellings.

    >>> line = "GET https://me:pw@example.org/x?api_key=abc failed; --config.hub_token=xyz"
    >>> redact(line, ["GET"])
    '<redacted> https://example.org/x?api_key=<redacted> failed; --config.hub_token=<redacted>'
    >>> redact("Server=db;User Id=sa;Password=a b c!;Timeout=5")
    'Server=db;User Id=sa;Password=<redacted>;Timeout=5'
    """
    # From specific forms to general ones, which would otherwise cut a part out of a longer secret.
    text = _PRIVATE_KEY.sub(REDACTED, text)
    text = _AUTHORIZATION.sub(rf"\g<head>{REDACTED}", text)
    text = _COOKIE.sub(rf"\g<head>{REDACTED}", text)
    text = _BEARER.sub(REDACTED, _BASIC.sub(REDACTED, text))
    text = _HARD_USER_INFO.sub("", _USER_INFO.sub(r"\1", text))
    text = _WEBHOOK.sub(REDACTED, _SHAPES.sub(REDACTED, text))
    text = _SIGNED_URL.sub(rf"\g<key>={REDACTED}", text)
    text = _CONNECTION.sub(_without_value, text)
    for pattern in (_ASSIGNED, _QUOTED, _FLAG):
        text = pattern.sub(_without_value, text)
    # Longest first: a secret may contain another one.
    for secret in sorted(set(secrets), key=len, reverse=True):
        text = _without(text, secret)
    return text


def _without_value(match: re.Match[str]) -> str:
    key, value = match["key"].strip("\"' -"), match["value"].strip("\"'")
    # ``PWD=`` is either a shell's working directory or a password in a connection string.
    named = is_secret(key) or (key.lower() == "pwd" and not value.startswith(("/", "~")))
    if (
        not named
        or not value
        or value.startswith(REDACTED)
        or _is_path(value)
        or _means_nothing(value)
    ):
        return match[0]
    return f"{match['key']}{match['equals']}{REDACTED}"


def _means_nothing(value: str) -> bool:
    """Whether a value is a constant, or a placeholder in our own error messages.

    An example is ``pass --config.hub_token=VALUE``.
    """
    return value.lower() in ("none", "null", "true", "false") or value in (
        "VALUE",
        "FILE",
        "FOLDER",
        "NUMBER",
    )


def _without(text: str, secret: str) -> str:
    """Removes `secret` from `text` as it is, URL-encoded or JSON-encoded.

    A short or wordlike secret is removed only as a whole word.
    """
    # The quotes that JSON puts around a text are cut off.
    for form in {secret, quote(secret, safe=""), quote(secret), json.dumps(secret)[1:-1]}:
        if len(form) < _SHORTEST or form.isalpha() or form.isdigit():
            text = re.sub(rf"(?<![A-Za-z0-9]){re.escape(form)}(?![A-Za-z0-9])", REDACTED, text)
        else:
            text = text.replace(form, REDACTED)
    return text


# ------------------------------------------------------------------------------------------- values

_SHORTEST = 6
"""Minimum length of an environment value that is searched for in texts.

Shorter values are usually words.
"""

_LONGEST_WORD = 10
"""Maximum length at which a value in one case counts as a word, as in ``AUTH=disabled``.

Searching for it would blank out an ordinary word.
"""

_COMMON = _set_of(
    """
    password postgres secret changeme example default disabled enabled required optional anonymous
    prompt plain basic digest kerberos negotiate admin guest nobody
    """
)
"""Values of password variables that are common words in logs."""


def known_secrets(argv: Sequence[str] = (), environ: Mapping[str, str] | None = None) -> list[str]:
    """Secret values given to this process in the environment (HF_TOKEN, ..) or on the command line.

    Args:
      argv: the arguments; the value of ``--config.hub_token=xyz`` counts, and a password in a URL.
      environ: variables by name; None reads those of this process.
    """
    found: list[str] = []
    for name, value in (os.environ if environ is None else environ).items():
        found += _searched_for(name, value) if is_secret(name) else _parts_of(value)
    words = list(argv)
    for word, after in zip(words, [*words[1:], ""][: len(words)], strict=True):
        flag, equals, value = word.partition("=")
        named = flag.startswith("-") and is_secret(flag.lstrip("-"))
        found += [value if equals else after] if named else []
        found += _parts_of(word)
    return [value for value in dict.fromkeys(found) if value]


def secrets_in(plain: Any, key: str = "") -> list[str]:
    """Secret values in plain data: those under a secret name, at any depth, and parts of URLs.

    >>> secrets_in({"seed": 1, "hub": {"api_key": "k-123456"}, "key": "user"})
    ['k-123456']
    """
    if isinstance(plain, Mapping):
        # Everything below a secret name is secret, whatever its own name is.
        inner = [
            secrets_in(value, key if is_secret(key) else str(name)) for name, value in plain.items()
        ]
    elif isinstance(plain, list | tuple):
        inner = [secrets_in(value, key) for value in plain]
    else:
        text = plain if isinstance(plain, str) else ""
        inner = [_searched_for(key, text) if is_secret(key) else _parts_of(text)]
    return [secret for found in inner for secret in found]


def _searched_for(name: str, value: str) -> list[str]:
    """The values of a secret variable to search texts for: no common words, numbers or paths."""
    parts = _parts_of(value)
    if len(value) < _SHORTEST or _is_path(value):
        return parts
    words = _words(name)
    password = any(_PASSWORD.search(w) or w in ("pass", "pwd") for w in words)
    if value.isalpha() and (value.islower() or value.istitle() or value.isupper()):
        common = value.lower() in _COMMON or (not password and len(value) <= _LONGEST_WORD)
        return [] if common else [value]
    if _is_number(value):
        return [value] if password and len(value) >= 8 else []
    return [value, *parts]


def _parts_of(value: str) -> list[str]:
    """Secrets inside a value with an ordinary name: in a URL, a header, a connection string."""
    found = [m[0] for m in _SHAPES.finditer(value)]
    for url in (*_USER_INFO.finditer(value), *_HARD_USER_INFO.finditer(value)):
        found += [part for part in [url[0].strip("/@").split(":", 1)[-1]] if len(part) >= _SHORTEST]
    found += [m["value"].strip("\"'{}") for m in _CONNECTION.finditer(value)]
    return [part for part in found if len(part) >= _SHORTEST]


def _is_number(value: str) -> bool:
    try:
        float(value)
    except ValueError:
        return False
    return True


def _is_path(value: str) -> bool:
    """Whether a value is a path: it exists, or is written like the path of a file."""
    if re.fullmatch(r"(~|\.{1,2})?(/[\w.@+~-]+)+\.\w{1,8}|~?/|[A-Za-z]:\\[^:*?\"<>|]*", value):
        return True
    # Only what looks like a path is looked up: a null byte or a very long name would raise.
    if not value.startswith(("/", "~", ".")) or "\0" in value or len(value) > 4096:
        return False
    try:
        return os.path.exists(os.path.expanduser(value))
    except OSError:
        return False
