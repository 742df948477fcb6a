"""E4: generated requests find no server error and nothing that the OpenAPI document does not say."""

from collections import Counter
from pathlib import Path

import pytest
import schemathesis
from schemathesis.config import SchemathesisConfig
from schemathesis.engine import Status, events, from_schema
from schemathesis.schemas import BaseSchema

from example_service.app.main import MIGRATIONS, create_app
from example_service.demo import free_port, running_service
from fastapi_building_blocks.infrastructure import SQLAlchemySession
from fastapi_building_blocks.infrastructure.database.migrations import upgrade
from tests.backends import run_apart
