"""A pool that serves many knows its tokens without asking the ledger each time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event

from jupyter_gpupool.core.errors import Unauthenticated
from jupyter_gpupool.pool.ledger.ledger import Ledger
from jupyter_gpupool.pool.tenancy.tokens import Tokens, new_token
from jupyter_gpupool.server.access.authentication import LedgerTokens


def test_a_token_costs_no_statement_and_its_revocation_holds_at_once(tmp_path: Path) -> None:
    ledger = Ledger(f"sqlite:///{tmp_path / 'ledger.sqlite'}")
    tokens = Tokens()
    authenticator = LedgerTokens(tokens)
    shown = tokens.create(ledger, new_token("a laptop", 1.0, owner="ada"))
    token = tokens.all()[0]
    asked: list[str] = []

    def note(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        asked.append(statement)

    event.listen(ledger._engine, "before_cursor_execute", note)
    for _ in range(10):
        assert authenticator.authenticate(f"Bearer {shown}", "127.0.0.1").owner == "ada"
    with pytest.raises(Unauthenticated):
        authenticator.authenticate(f"Bearer {shown[:-1]}-", "127.0.0.1")
    assert not asked
    tokens.revoke(ledger, token.id, 2.0, cuts_leases=True)
    caller = authenticator.authenticate(f"Bearer {shown}", "127.0.0.1")
    assert (
        caller.objection.startswith("Token revoked at")
        and caller.cut
        and not authenticator.is_still_valid(caller)
    )
    ledger.close()
