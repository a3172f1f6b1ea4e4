"""What a cluster's scheduler is told of a program; there is none here."""

from types import SimpleNamespace

ArtifactType = SimpleNamespace(DIRECTORY=0)


def work_unit():
    return SimpleNamespace(set_task_status=lambda text: None, create_artifact=lambda *about: None)
