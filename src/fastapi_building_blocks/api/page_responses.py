"""Pages as response models: ``response_model=PageResponse[UserResponse]``."""

from typing import Generic, TypeVar

from pydantic import BaseModel, ConfigDict, Field

T = TypeVar("T")


class PageResponse(BaseModel, Generic[T]):
    """One page by offset; made from a ``Page`` by returning it."""

    model_config = ConfigDict(from_attributes=True)

    items: list[T] = Field(description="The entities on this page.")
    total: int | None = Field(description="How many match on all pages; null where it was not counted.")
    limit: int = Field(description="How many a page holds at most.")
    offset: int = Field(description="How many come before this page.")
    has_next: bool = Field(description="Whether a page follows.")
    has_prev: bool = Field(description="Whether a page comes before.")
    total_is_capped: bool = Field(
        default=False,
        exclude_if=lambda capped: not capped,
        description="Present and true where total is only a lower bound.",
    )


class CursorPageResponse(BaseModel, Generic[T]):
    """One page by keyset; made from a ``CursorPage`` by returning it."""

    model_config = ConfigDict(from_attributes=True)

    items: list[T] = Field(description="The entities on this page.")
    next_cursor: str | None = Field(description="The cursor of the page that follows, if one does.")
    prev_cursor: str | None = Field(description="The cursor of the page before, if there is one.")
