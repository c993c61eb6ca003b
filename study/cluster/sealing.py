"""Sealing: settings that travel to a cluster and that only its own token opens.

token ──HKDF──> key        {"MLFLOW_TRACKING_PASSWORD": ...} ──seal──> text in the job's environment ──unseal, on the head──> os.environ

Ray keeps the environment of a job, and shows it in the dashboard and in `ray job list`. Whoever holds the cluster's token may run anything
there and read everything; sealed, the settings stay out of screens, terminals, pasted listings and Ray's records on disk.
"""

import base64
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from study.errors import ClusterError

if TYPE_CHECKING:
    from cryptography.fernet import Fernet

SEALED = "STUDY_SEALED"
"""The variable that holds sealed settings."""

PURPOSE = b"effective-lr-study: settings of a submitted study"


def token_of(environment: Mapping[str, str]) -> str:
    """The token of the cluster, from where Ray takes it: `$RAY_AUTH_TOKEN`, the file `$RAY_AUTH_TOKEN_PATH`, `~/.ray/auth_token`; empty if none.

    Raises:
        ClusterError: if the file that is named cannot be read.
    """
    if token := environment.get("RAY_AUTH_TOKEN", "").strip():
        return token
    named = environment.get("RAY_AUTH_TOKEN_PATH")
    path = Path(named or Path.home() / ".ray" / "auth_token")
    try:
        return path.read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        if not named:
            return ""
        reason = getattr(error, "strerror", None) or "not text"
        remedy = "RAY_AUTH_TOKEN_PATH must name the file that holds the cluster's token"
        raise ClusterError(f"the token cannot be read ({reason})", where=named, remedy=remedy) from None


def seal(settings: Mapping[str, str], token: str) -> str:
    """Settings as one word, which `unseal` opens with the same token."""
    return _cipher(token).encrypt(json.dumps(dict(settings)).encode()).decode()


def unseal(sealed: str, token: str) -> dict[str, str]:
    """What `seal` was given.

    Raises:
        ClusterError: if the token is another one, or the text was changed.
    """
    from cryptography.fernet import InvalidToken

    try:
        return {str(name): str(value) for name, value in json.loads(_cipher(token).decrypt(sealed.encode())).items()}
    except InvalidToken:
        remedy = "give every node of the cluster the token that its dashboard asks for, by RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH"
        raise ClusterError("the settings that came with this study are sealed with another token", where=SEALED, remedy=remedy) from None


def _cipher(token: str) -> "Fernet":
    from cryptography.fernet import Fernet
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    key = HKDF(SHA256(), 32, salt=None, info=PURPOSE).derive(token.encode())
    return Fernet(base64.urlsafe_b64encode(key))
