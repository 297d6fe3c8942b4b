"""What can be configured; every field is an environment variable with the prefix DATABASE_."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, SecretStr, ValidationError, ValidationInfo, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from database.errors import ConfigurationError
from database.models.base import TENANT_PATTERN

__all__ = ["Settings", "load_settings"]

Seconds = Annotated[float, Field(gt=0)]


class Settings(BaseSettings):
    """The configuration, read from arguments, the environment and `.env`, in this order."""

    model_config = SettingsConfigDict(
        env_prefix="DATABASE_",
        env_file=".env",
        extra="ignore",
        frozen=True,
        hide_input_in_errors=True,
    )

    url: SecretStr | None = Field(
        None, description="Where the database is; unset, the embedded server in data_dir"
    )
    migration_url: SecretStr | None = Field(
        None, description="The owner's login for migrations; unset, `url`"
    )
    environment: Literal["development", "test", "production"] = "development"
    development_api_key: Annotated[SecretStr, Field(min_length=16)] | None = Field(
        None, description="Accepted as an API key of one user of tenant_id; never in production"
    )
    tenant_id: Annotated[str, Field(pattern=TENANT_PATTERN)] = "default"
    app_role: Annotated[str, Field(pattern=r"^([a-z_][a-z0-9_]{0,62})?$")] = Field(
        "database_app", description="The role that row-level security applies to; empty: none"
    )
    embedding_dimensions: Annotated[int, Field(ge=1, le=4000)] = 1536
    unstorable: Literal["replace", "error"] = Field(
        "replace", description="What to do with NUL, lone surrogates, NaN and Infinity"
    )
    data_dir: Path | None = Field(None, description="The embedded server's; default .database")

    pool_size: Annotated[int, Field(ge=1)] = 10
    max_overflow: Annotated[int, Field(ge=0)] = 20
    pool_timeout: Seconds = 30
    pool_recycle: Annotated[int, Field(ge=-1)] = 300
    pool_pre_ping: bool = True
    echo: bool = False

    connect_timeout: Annotated[int, Field(ge=1)] = 10
    connect_retries: Annotated[int, Field(ge=0)] = 3
    statement_timeout: Seconds | None = None
    idle_in_transaction_timeout: Seconds | None = None
    lock_timeout: Seconds = Field(10, description="How long a migration waits for a lock")
    application_name: str = "database"
    sslmode: Literal["disable", "allow", "prefer", "require", "verify-ca", "verify-full"] | None = (
        None
    )
    prepare_threshold: Annotated[int, Field(ge=0)] | None = Field(
        5, description="Prepare a statement from this use on; none behind PgBouncer"
    )

    @field_validator("development_api_key")
    @classmethod
    def _refuse_in_production(
        cls, value: SecretStr | None, info: ValidationInfo
    ) -> SecretStr | None:
        if value is not None and info.data.get("environment") == "production":
            msg = "DATABASE_DEVELOPMENT_API_KEY: must not be set in production"
            raise ConfigurationError(msg)
        return value


def load_settings(**values: object) -> Settings:
    """Return the settings, `values` before the environment.

    Raises:
        ConfigurationError: A value is not allowed, or unknown; it is named, never shown.
    """
    unknown = values.keys() - Settings.model_fields.keys()
    if unknown:
        msg = f"unknown settings: {', '.join(sorted(unknown))}"
        raise ConfigurationError(msg)
    try:
        return Settings(**values)  # type: ignore[arg-type]
    except ValidationError as error:
        found = "; ".join(
            f"DATABASE_{'_'.join(map(str, e['loc'])).upper()}: {e['msg']}" for e in error.errors()
        )
        raise ConfigurationError(found) from None
