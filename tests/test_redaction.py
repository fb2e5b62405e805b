"""Secrets never reach a file: neither by what they look like, nor by where they come from."""

import pytest

from dialogpt_ds.config.argument_checks import argument_problems
from dialogpt_ds.config.arguments import TrainingArguments
from dialogpt_ds.redaction import without_secrets


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "https://bucket.s3.amazonaws.com/shards?X-Amz-Signature=0123abcd&x=1",
            "https://bucket.s3.amazonaws.com/shards?(left out)",
        ),
        ("3:https://a.b/x?sig=1,1:/local", "3:https://a.b/x?(left out)"),
        ("https://me:pass@host/shards", "https://(left out)@host/shards"),
        ("https://me:p@ss@host/shards", "https://(left out)@host/shards"),
        ("https://ghp_token@github.com/a/b.git", "https://(left out)@github.com/a/b.git"),
        (
            "pipe:AWS_SECRET_ACCESS_KEY=abc/d+e aws s3 cp s3://b/{} -",
            "pipe:AWS_SECRET_ACCESS_KEY=(left out) aws s3 cp s3://b/{} -",
        ),
        ("pipe:curl -u me:pass https://host/{}", "pipe:curl -u (left out) https://host/{}"),
        ("pipe:curl --oauth2-bearer abc https://host/{}", "pipe:curl --oauth2-bearer (left out) https://host/{}"),
        ("pipe:fetch --token abc {}", "pipe:fetch --token (left out) {}"),
        (
            'pipe:curl -H "PRIVATE-TOKEN: abc" https://host/{}',
            'pipe:curl -H "PRIVATE-TOKEN: (left out)" https://host/{}',
        ),
        ('pipe:curl -H "Cookie: a=b; c=d" https://host/{}', 'pipe:curl -H "Cookie: (left out)" https://host/{}'),
        ("glpat-abcdefghijklmnopqrst", "(left out)"),
        ("s3://bucket/user@home/shards", "s3://bucket/user@home/shards"),
        ("lr=1e-3 KEYS=3 loss: 2", "lr=1e-3 KEYS=3 loss: 2"),
        (
            'pipe:curl -H "Authorization: Bearer abcdef" https://host/{}',
            'pipe:curl -H "Authorization: (left out)" https://host/{}',
        ),
        ("token hf_abcdefghijklmnopqrstuvwx here", "token (left out) here"),
        ("AKIAABCDEFGHIJKLMNOP", "(left out)"),
        ("/data/shards", "/data/shards"),
        ("pipe:aws s3 cp s3://bucket/{} -", "pipe:aws s3 cp s3://bucket/{} -"),
        ("what? nothing://here", "what? nothing://here"),
    ],
)
def test_what_looks_like_a_secret_is_left_out(text: str, expected: str) -> None:
    assert without_secrets(text) == expected


def test_what_an_environment_variable_keeps_is_left_out_wherever_it_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false-but-long")
    monkeypatch.setenv("SOME_KEY", "short")
    monkeypatch.setenv("OTHER_SECRET", "/begins/like/a/path")
    monkeypatch.setenv("FILE_OF_KEY", __file__)
    said = f"key=0123456789abcdef, false-but-long, short, /begins/like/a/path, {__file__}"
    assert without_secrets(said) == f"key=$WANDB_API_KEY, false-but-long, short, $OTHER_SECRET, {__file__}"


def test_nested_values_and_names_of_keys() -> None:
    config = {
        "comet": {"api_key": "abc", "enabled": True},
        "list": [("https://a:b@c/d",)],
        "h": {"Authorization": "Bearer x"},
        "no_token_id": True,
        "eos_token": "<eos>",
    }
    assert without_secrets(config) == {
        "comet": {"api_key": "(left out)", "enabled": True},
        "list": [["https://(left out)@c/d"]],
        "h": {"Authorization": "(left out)"},
        "no_token_id": True,
        "eos_token": "<eos>",
    }


def test_a_configuration_that_lost_a_secret_says_so_when_it_is_used_again() -> None:
    found = argument_problems(TrainingArguments(train_input_file="https://a/b?(left out)", skip_eval=True))
    assert found == [
        "--train_input_file 'https://a/b?(left out)': a secret was left out when this was written down; give the whole "
        "value on the command line"
    ]
