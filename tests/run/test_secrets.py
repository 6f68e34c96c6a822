"""Which names and texts are secret, and that what is none stays readable."""

from __future__ import annotations

import json
import os

import pytest

from rlhf_jax.run import secrets as S


def words(text: str) -> list[str]:
    return text.split()


SECRET_NAMES = words(
    """
    HF_TOKEN HUGGING_FACE_HUB_TOKEN WANDB_API_KEY GITHUB_PAT GITHUB_TOKEN GH_TOKEN OPENAI_KEY
    OPENAI_API_KEY ANTHROPIC_API_KEY FOO_API_KEY AWS_SECRET_ACCESS_KEY AWS_SESSION_TOKEN
    AWS_ACCESS_KEY_ID AZURE_CLIENT_SECRET DATABASE_URL REDIS_URL MONGO_URI MONGODB_URI
    SQLALCHEMY_DATABASE_URI CELERY_BROKER_URL SENTRY_DSN DSN CONNECTION_STRING
    AZURE_STORAGE_CONNECTION_STRING DB_CONN_STR ConnectionString PASSWD DB_PASSWORD DB_PASS SMTP_PASS
    PASSPHRASE PGPASSWORD MYSQL_PWD DB_PWD SSHPASS ADMIN_PASSWD SECRET SECRET_KEY DJANGO_SECRET_KEY
    CLIENT_SECRET SIGNING_KEY PRIVATE_KEY SSH_PRIVATE_KEY LICENSE_KEY STRIPE_KEY COMET_KEY KAGGLE_KEY
    SOME_VENDOR_KEY COOKIE Set-Cookie session_cookie SESSION_ID JSESSIONID connect_sessionid
    Authorization Proxy-Authorization X-Api-Key x-auth-token NPM_AUTH BASIC_AUTH AZURE_DEVOPS_EXT_PAT
    JWT hf_token hubToken apiKey OpenAIKey openai_key api_key apikey accountKey private_key auth_token
    access_token refresh_token bearer_token client_secret credentials db.password tracker.api_key
    wandb-api-key SLACK_WEBHOOK_URL GOOGLE_API_KEY token TOKEN password pwd
    """
)

OTHER_NAMES = words(
    """
    PWD OLDPWD HOME PATH PYTHONPATH LD_LIBRARY_PATH HF_HOME HF_TOKEN_PATH XDG_CACHE_HOME XDG_SESSION_ID
    XDG_RUNTIME_DIR SSH_AUTH_SOCK GPG_AGENT_INFO SSH_KEY_PATH TLS_KEY_FILE PASSWORD_FILE PGPASSFILE
    XAUTHORITY INIT_CWD DESKTOP_SESSION PUBLIC_KEY SSH_PUBLIC_KEY SORT_KEY CACHE_KEY LESSKEY KEYTIMEOUT
    eos_token bos_token pad_token unk_token mask_token image_token stop_token end_token eos_token_id
    token_id token_ids pad_token_id decoder_start_token_id max_tokens max_new_tokens tokens
    tokens_per_row nats_per_token loss_per_token tokenizer tokenizer_path TOKENIZERS_PARALLELISM
    token_type token_limit token_dropout next_token first_token key keys key_bias num_key_value_heads
    kv_keys group_key primary_key rng_key monkey monkey_token_count keyboard author authors authority
    auth_type auth_method author_id password_length secret_name session passes forward_pass compass
    bypass pattern path patience patch model_url reward_url url uri base_uri tracking_uri seed lr user
    username cookie_count sessions signature design
    """
)


@pytest.mark.parametrize("name", SECRET_NAMES)
def test_a_name_that_says_so_holds_a_secret(name: str):
    assert S.is_secret(name)
    assert S.is_secret(f"config.tracker.{name}")


@pytest.mark.parametrize("name", OTHER_NAMES)
def test_a_name_that_only_sounds_alike_does_not(name: str):
    assert not S.is_secret(name)


BODY = "Ab3dEf6hIj9kLm2nOp5q"
SHAPES = {
    "github": f"ghp_{BODY}RsTuVwXyZ012345",
    "github fine-grained": f"github_pat_11ABCDEFG0{BODY}_{BODY}",
    "gitlab": f"glpat-{BODY}",
    "hugging face": f"hf_{BODY}RsTuVwXyZabcd",
    "openai": f"sk-{BODY}{BODY}",
    "openai project": f"sk-proj-{BODY}-{BODY}",
    "anthropic": f"sk-ant-api03-{BODY}_{BODY}-AA",
    "slack": "xoxb-123456789012-123456789012-AbCdEfGhIjKl",
    "aws": "AKIAIOSFODNN7EXAMPLE",
    "google": f"AIzaSy{BODY}{BODY}",
    "jwt": "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmNHl0w5N",
    "stripe": f"sk_live_{BODY}",
    "groq": f"gsk_{BODY}{BODY}",
    "key block": f"-----BEGIN OPENSSH PRIVATE KEY-----\n{BODY}\n{BODY}\n-----END OPENSSH PRIVATE KEY-----",
    "key cut off": f"-----BEGIN PRIVATE KEY-----\n{BODY}",
}


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize(
    "text", ["{}", "cannot read {} here", "x={}&y", '{{"anything": "{}"}}', "('{}', 3)"]
)
def test_a_token_of_a_known_shape_is_hidden_wherever_it_stands(kind: str, text: str):
    told = S.redact(text.format(SHAPES[kind]))
    assert BODY[:12] not in told
    assert SHAPES[kind][-8:] not in told
    assert S.REDACTED in told


CANARY = "c4nary/Qx+77="
IN_TEXTS = [
    "postgres://user:{}@db.example.org:5432/app",
    "connect to mongodb+srv://user:{}@host/x failed",
    "Server=tcp:db.example.org;User Id=sa;Password={};Encrypt=True",
    "Driver={{ODBC}};Server=db;UID=sa;PWD={};",
    "DefaultEndpointsProtocol=https;AccountName=me;AccountKey={};EndpointSuffix=core.windows.net",
    "Endpoint=sb://x/;SharedAccessKeyName=root;SharedAccessKey={}",
    "https://x.blob.core.windows.net/c?sv=2020-08-04&sig={}",
    "Authorization: Bearer {}",
    "Authorization: Basic {}",
    "authorization: {}",
    "{{'Authorization': 'Token {}'}}",
    "Cookie: theme=dark; session={}; lang=en",
    "Set-Cookie: sid={}; Path=/; HttpOnly",
    "{{'Cookie': 'sid={}'}}",
    '{{"api_key": "{}", "seed": 3}}',
    "config {{'password': '{}'}}",
    "--config.hub_token={}",
    "--config.hub_token {}",
    "password='{}' is wrong",
    "GITHUB_PAT={}",
    "MYSQL_PWD={} mysql -u me",
    "GET /v1?access_token={}&x=1",
]


@pytest.mark.parametrize("text", IN_TEXTS)
def test_a_text_that_says_what_it_holds_loses_it(text: str):
    told = S.redact(text.format(CANARY))
    assert CANARY not in told
    assert "nary" not in told, told


READABLE = [
    "cannot read /data/runs/sft/epoch-1: no such folder",
    "PWD=/data/runs OLDPWD=/srv/somebody",
    "--config.model=runs/sft/epoch-3 must be a folder",
    "eos_token=<|endoftext|> pad_token='<pad>' max_new_tokens=64",
    "config.key=user",
    "'key': 'user', 'keys': 'a'",
    "http://localhost:8080/x@y?mail=a@b.org",
    "task-specific risk-averse sk-learn scikit-learn-contrib-extension",
    "the hf_transfer_enabled_for_everybody switch",
    "A cookie: take flour and sugar",
    "basic training, bearer of news",
    "token_id=5 is not below vocab_size=1200",
    "tokenizer=/models/gpt2 and author=Ada Lovelace",
    "password=None and api_key=null",
    "--config.hub_token needs a value: --config.hub_token=VALUE",
]


@pytest.mark.parametrize("text", READABLE)
def test_what_is_no_secret_is_told_as_it_is(text: str):
    assert S.redact(text) == text


def test_a_normal_environment_holds_no_secret(tmp_path):
    """Paths, numbers, words: nothing that would blank out the text of a log."""
    here = str(tmp_path)
    normal = {
        "PWD": here, "OLDPWD": str(tmp_path.parent), "HOME": here, "PATH": "/usr/bin:/bin", "USER": "somebody",
        "SSH_AUTH_SOCK": f"{here}/agent", "XDG_SESSION_ID": "12345678", "XDG_RUNTIME_DIR": here, "SHELL": "/bin/bash",
        "GPG_AGENT_INFO": f"{here}/S.gpg:0:1", "HF_HOME": here, "HF_TOKEN_PATH": f"{here}/token", "LANG": "C.UTF-8",
        "GOOGLE_APPLICATION_CREDENTIALS": f"{here}/service.json", "GIT_AUTH": "disabled", "API_TOKEN": "12345678",
        "USE_TOKEN": "true", "DB_PASSWORD": "postgres", "AUTH": "kerberos", "CREDENTIALS": here, "MY_TOKEN": "None",
    }  # fmt: skip
    assert S.known_secrets([f"--config.model={here}/model", "--config.key=user"], normal) == []


@pytest.mark.parametrize(
    ("name", "value", "hidden"),
    [
        ("HF_TOKEN", "canary-4711", "canary-4711"),
        ("GITHUB_PAT", "canary-4711", "canary-4711"),
        ("OPENAI_KEY", "canary-4711", "canary-4711"),
        ("MYSQL_PWD", "canary-4711", "canary-4711"),
        ("PGPASSWORD", "swordfish", "swordfish"),
        ("PASSPHRASE", "correct horse battery staple", "correct horse battery staple"),
        ("DATABASE_URL", "postgres://me:canary-4711@h/db", "canary-4711"),
        ("SENTRY_DSN", "https://0123abcd4567@o1.ingest.example.org/5", "0123abcd4567"),
        ("SOMETHING", "redis://:canary-4711@h:6379/0", "canary-4711"),
        ("UPSTREAM", "Server=h;Password=canary-4711;", "canary-4711"),
        ("NOTES", f"use ghp_{BODY}RsTuVwXyZ012345 there", f"ghp_{BODY}RsTuVwXyZ012345"),
        ("COOKIE", "sid=canary-4711", "sid=canary-4711"),
    ],
)
def test_a_secret_of_the_environment_is_found_in_any_text(name: str, value: str, hidden: str):
    known = S.known_secrets([], {name: value})
    assert hidden in known
    for text in (f"cannot open '{hidden}'", f"{hidden}: wrong", f"x-{hidden}-y"):
        assert hidden not in S.redact(text, known)


def test_a_secret_is_found_as_urls_and_json_write_it():
    known = S.known_secrets([], {"DB_PASSWORD": 'p"w/4711 ü'})
    for text in ("a p%22w%2F4711%20%C3%BC b", json.dumps({"x": 'p"w/4711 ü'})):
        assert "4711" not in S.redact(text, known)


def test_a_password_that_is_a_word_is_hidden_as_a_whole_word_only():
    known = S.known_secrets([], {"DB_PASSWORD": "swordfish"})
    assert S.redact("swordfish, swordfishes", known) == f"{S.REDACTED}, swordfishes"


@pytest.mark.parametrize("argv", [[], ["--overwrite"], ["--config.hub_token"], [""]])
def test_any_command_line_can_be_looked_through(argv: list[str]):
    assert S.known_secrets(argv, {}) == []


def test_secrets_of_the_command_line_and_of_a_config_are_found():
    argv = [
        "--config.hub_token=canary-1",
        "--config.api_key",
        "canary-2",
        "--config.url=https://me:canary-3@h/x",
    ]
    assert set(S.known_secrets(argv, {})) == {"canary-1", "canary-2", "canary-3"}
    config = {
        "tracker": {"credentials": {"user": "canary-4", "pair": [["canary-5"]]}},
        "mirror": "s3://canary-6@b",
    }
    assert set(S.secrets_in(config)) == {"canary-4", "canary-5", "canary-6"}
    assert (
        S.secrets_in({"key": "user-4711", "eos_token": "<|endoftext|>", "model": os.getcwd()}) == []
    )
