"""What a user is, and what a new id is."""

import time
import uuid

from hypothesis import given
from hypothesis import strategies as st

from example_service.app.domain.identifiers import uuid7
from example_service.app.domain.user import User, UserStatus


def test_a_uuid7_is_one_by_rfc_9562():
    before = time.time_ns() // 1_000_000
    made = uuid7()
    after = time.time_ns() // 1_000_000
    assert (made.version, made.variant) == (7, uuid.RFC_4122)
    assert before <= made.int >> 80 <= after


def test_uuid7s_of_different_times_sort_by_time(monkeypatch):
    moments = [0, 1_000, 999_999, 1_000_000, 1_000_500, 2**47 * 1_000_000, (2**48 - 1) * 1_000_000 + 999_999]
    made = []
    for moment in moments:
        monkeypatch.setattr(time, "time_ns", lambda moment=moment: moment)
        made.append(uuid7())
    assert made == sorted(made)
    assert [one.int >> 80 for one in made] == [moment // 1_000_000 for moment in moments]
    assert {(one.version, one.variant) for one in made} == {(7, uuid.RFC_4122)}


def test_uuid7s_of_one_moment_differ(monkeypatch):
    monkeypatch.setattr(time, "time_ns", lambda: 1_800_000_000_123_456_789)
    assert len({uuid7() for _ in range(10_000)}) == 10_000


@given(st.one_of(st.none(), st.text()), st.one_of(st.none(), st.text()))
def test_a_full_name_is_the_other_two_joined(first: str | None, last: str | None):
    user = User.register(email="a@b.co", username="abc", first_name=first, last_name=last)
    assert user.full_name == (" ".join(filter(None, [first, last])) or None)


def test_a_full_name_that_is_given_is_kept():
    assert User.register(email="a@b.co", username="abc", first_name="A", full_name="").full_name == ""


def test_a_new_user_is_active_and_nothing_more():
    user = User.register(email="Alice@Test.COM", username="Alice")
    assert (user.email, user.username) == ("alice@test.com", "Alice")
    assert (user.status, user.is_verified, user.is_admin, user.version) == (UserStatus.ACTIVE, False, False, 1)


def test_the_password_hash_is_not_shown_by_accident():
    assert "secret" not in repr(User(email="a@b.co", username="abc", hashed_password="secret"))
