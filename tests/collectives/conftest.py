from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.collectives.ranks import RankFailed, Ranks, attach_with, detach, meet


@pytest.fixture(scope="session")
def attached() -> Iterator[Callable[[int], Ranks]]:
    """Processes with a workspace, by their number. Those that a test left in failure are replaced,
    so that others do not fail with it."""
    made: dict[int, Ranks] = {}

    def get(count: int) -> Ranks:
        if count in made and not _can_go_on(made[count]):
            made.pop(count).close()
        if count not in made:
            made[count] = Ranks(count)
            made[count].run(attach_with, {"timeout_s": 60.0})
        return made[count]

    yield get
    for each in made.values():
        each.close()


def _can_go_on(ranks: Ranks) -> bool:
    if ranks.failed:
        return False
    try:
        ranks.run(meet)
    except RankFailed:
        return False
    return True


@pytest.fixture(scope="session")
def _spare() -> Iterator[Ranks]:
    with Ranks(3) as ranks:
        yield ranks


@pytest.fixture
def three(_spare: Ranks) -> Iterator[Ranks]:
    """Three processes with a workspace that may be left in failure."""
    _spare.run(attach_with, {})
    yield _spare
    _spare.run(detach)


@pytest.fixture
def fresh() -> Iterator[Callable[..., Ranks]]:
    """New processes with a workspace, that may be killed or left in failure."""
    made: list[Ranks] = []

    def get(count: int, **settings: object) -> Ranks:
        ranks = Ranks(count)
        made.append(ranks)
        ranks.run(attach_with, settings)
        return ranks

    yield get
    for each in made:
        each.close()
