"""The ledger's format: made step by step, taken up from older versions without loss, and never guessed at."""

from __future__ import annotations

import re
import sqlite3
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy import create_engine

from jupyter_gpupool.core.errors import LedgerUnavailable
from jupyter_gpupool.core.models import LeaseState, WorkerAddress
from jupyter_gpupool.pool.ledger import migrations, tables
from jupyter_gpupool.pool.ledger.ledger import Ledger
from jupyter_gpupool.pool.manager import Manager
from jupyter_gpupool.pool.tenancy.tokens import Tokens

#: What a version before Alembic wrote: four leases, a token and their tables.
BEFORE_ALEMBIC = Path(__file__).with_name("ledger_before_alembic.sql")


@pytest.fixture
def db_url(path: Path) -> str:
    """Files alone: test_ledgers.py has the same of PostgreSQL, where it is not SQLite's."""
    return f"sqlite:///{path}"


def definitions(path: Path) -> dict[str, list[str]]:
    """Every table and index of an SQLite file, as the database knows it, without the order of constraints."""
    with sqlite3.connect(path) as connection:
        rows = connection.execute("SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL").fetchall()
    connection.close()
    parts = {name: re.fullmatch(r"(.*?)\((.*)\)(.*)", sql, re.S) for name, sql in rows}
    # At commas that are in no further brackets; a column that was added later is on the last line.
    return {
        name: sorted([found[1].strip(), *re.split(r"\s*,\s*(?![^()]*\))", found[2].strip()), found[3]])
        for name, found in parts.items()
        if found and name != "alembic_version"
    }


def leases(path: Path) -> list[tuple]:
    with sqlite3.connect(path) as connection:
        found = connection.execute("SELECT * FROM leases ORDER BY seq").fetchall()
        found = [row[:22] for row in found]  # the columns of the first format
        found += connection.execute("SELECT * FROM slices ORDER BY lease, gpu_index").fetchall()
        found += [row[:11] for row in connection.execute("SELECT * FROM tokens")]
        found += connection.execute("SELECT uuid, memory_mib, used_mib FROM gpus ORDER BY uuid").fetchall()
    connection.close()
    return found


def test_the_steps_lead_to_the_tables_that_the_code_knows(path: Path, tmp_path: Path, ledger: Ledger) -> None:
    other = tmp_path / "directly.sqlite"
    engine = create_engine(f"sqlite:///{other}")
    tables.metadata.create_all(engine)
    engine.dispose()
    assert definitions(path) == definitions(other)


def test_the_steps_are_a_line_that_ends_at_this_versions_format() -> None:
    config = Config()
    config.set_main_option("script_location", str(Path(migrations.__file__).parent))
    steps = [step.revision for step in ScriptDirectory.from_config(config).walk_revisions()]
    assert steps == [f"{number:04}" for number in range(tables.SCHEMA_VERSION, 0, -1)]


def test_a_ledger_from_before_alembic_is_taken_up_without_loss(path: Path) -> None:
    with sqlite3.connect(path) as connection:
        connection.executescript(BEFORE_ALEMBIC.read_text())
    connection.close()
    before = leases(path)
    ledger = Ledger(f"sqlite:///{path}")
    assert leases(path) == before
    manager = Manager(ledger)
    assert [(lease.state, len(lease.slices)) for lease in manager.leases(include_ended=True)] == [
        (LeaseState.ACTIVE, 2),
        (LeaseState.GRANTED, 1),
        (LeaseState.QUEUED, 0),
        (LeaseState.CANCELLED, 0),
    ]
    first = manager.lease(str(uuid.UUID(int=1)))
    assert first.worker == WorkerAddress("127.0.0.1", 4711, 12345, 999.5)
    tokens = Tokens()
    tokens.read(ledger)
    assert [token.owner for token in tokens.all()] == ["administrator"]
    ledger.close()
    fresh = path.with_name("fresh.sqlite")
    Ledger(f"sqlite:///{fresh}").close()
    assert definitions(path) == definitions(fresh)


def test_one_that_lacks_the_younger_tables_gets_them(path: Path) -> None:
    """They were made where they were missing, so a ledger may have seen only versions without them."""
    with sqlite3.connect(path) as connection:
        connection.executescript(BEFORE_ALEMBIC.read_text())
        connection.execute("DROP TABLE tokens")
        connection.execute("DROP TABLE samples")
    connection.close()
    Ledger(f"sqlite:///{path}").close()
    assert {"tokens", "samples"} <= set(definitions(path))


def test_steps_that_cannot_be_taken_leave_the_ledger_as_it_was(path: Path) -> None:
    with sqlite3.connect(path) as connection:
        connection.executescript(BEFORE_ALEMBIC.read_text())
        connection.execute("UPDATE gpupool_schema SET version = 0")
        connection.execute("DROP TABLE tokens")
        connection.execute("CREATE TABLE alembic_version (version_num VARCHAR(32))")
        connection.execute("INSERT INTO alembic_version VALUES ('nobody knows')")
    connection.close()
    before = definitions(path)
    with pytest.raises(LedgerUnavailable) as caught:
        Ledger(f"sqlite:///{path}")
    assert "nobody knows" in str(caught.value) and "\n" not in str(caught.value)
    assert definitions(path) == before


def test_a_current_ledger_is_opened_without_alembic(path: Path, ledger: Ledger) -> None:
    """It would cost every start of a pool a good part of its time."""
    program = (
        "import sys; from jupyter_gpupool.pool.ledger.ledger import Ledger; "
        f"Ledger('sqlite:///{path}').close(); sys.exit('alembic' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
