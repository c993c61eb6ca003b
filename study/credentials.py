"""Credentials: what must not stand in a spec, as specs are kept in folders, shown in MLflow and sent to clusters.

args: {password: hunter2}                      a key that names a secret, and a text
data.path: https://me:hunter2@host/file        a URL with a password
anything: AKIA..., ghp_..., -----BEGIN ... KEY  a text that looks like a known kind of key
"""

import re
from collections.abc import Iterator, Mapping

from study.errors import Problem

ADVICE = "take it out, read it in your own function from the environment (os.environ), and change it if the file was ever shared"

_NAMES = re.compile(
    r"(?:^|[_.-])(?:password|passwd|passphrase|pwd|secret|secret[_-]?key|api[_-]?key|access[_-]?key|private[_-]?key|credentials?"
    r"|(?:access|api|auth|bearer|hf|hub|refresh|session|secret)[_-]?token)$",
    re.IGNORECASE,
)
"""Keys whose text is a secret."""

_MAY_NAME = re.compile(r"(?:^|[_.-])(?:token|key|auth|authorization)$", re.IGNORECASE)
"""Keys whose text is one if it is long and looks random: `pad_token: <pad>` is none."""

_RANDOM = re.compile(r"(?=.*[0-9])(?=.*[A-Za-z])[A-Za-z0-9_\-+/=.]{16,}")

_KNOWN = re.compile(
    r"://[^\s/?#@]*:[^\s/?#@]+@"
    r"|[?&](?:password|token|secret|api_?key|access_?key|sig|signature)=[^&\s]"
    r"|\b(?:AKIA|ASIA)[0-9A-Z]{16}\b"
    r"|\b(?:ghp|gho|ghs|ghu)_[A-Za-z0-9]{30,}|\bgithub_pat_\w{30,}|\bhf_[A-Za-z0-9]{30,}|\bxox[abp]-\w{10,}|\bsk-[A-Za-z0-9_-]{30,}"
    r"|\beyJ[\w-]{10,}\.eyJ[\w-]{10,}\."
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----",
    re.IGNORECASE,
)
"""Texts that are secrets whatever their key."""


def credential_problems(tree: object, where: str = "") -> Iterator[Problem]:
    """Every value of a spec's plain values that looks like a credential; the message does not repeat it."""
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            place = f"{where}/{key}" if where else str(key)
            # An axis is named by the field that it varies.
            texts = value["choices"] if isinstance(value, Mapping) and isinstance(value.get("choices"), list | tuple) else [value]
            if any(isinstance(text, str) and _is_secret(str(key), text) for text in texts):
                yield _problem("looks like a credential, by its name (its value is not shown)", place)
            else:
                yield from credential_problems(value, place)
    elif isinstance(tree, list | tuple):
        for index, value in enumerate(tree):
            yield from credential_problems(value, f"{where}/{index}")
    elif isinstance(tree, str) and _KNOWN.search(tree):
        yield _problem("holds what looks like a credential (it is not shown)", where)


def _is_secret(key: str, value: str) -> bool:
    return bool(value) and bool(_NAMES.search(key) or (_MAY_NAME.search(key) and _RANDOM.fullmatch(value)))


def _problem(message: str, where: str) -> Problem:
    return Problem("credential", message, where, ADVICE)
