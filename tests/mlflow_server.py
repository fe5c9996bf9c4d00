"""A real MLflow server of this process, on loopback, over an SQLite store."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from werkzeug.serving import make_server


@contextmanager
def mlflow_server(patch: pytest.MonkeyPatch, *, store: str, directory: Path) -> Iterator[str]:
    """Serve a store over HTTP; gives the address."""
    patch.setenv("_MLFLOW_SERVER_FILE_STORE", store)
    patch.setenv("_MLFLOW_SERVER_REGISTRY_STORE", store)
    patch.setenv("_MLFLOW_SERVER_ARTIFACT_ROOT", directory.as_uri())
    from mlflow.server import app, handlers

    patch.setattr(handlers, "_tracking_store", None)
    patch.setattr(handlers, "_model_registry_store", None)
    server = make_server("127.0.0.1", 0, app, threaded=True)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
