"""Tests of the queue that is fair between callers."""

from __future__ import annotations

from collections import Counter, defaultdict
from itertools import permutations

from hypothesis import given
from hypothesis import strategies as st

from service.kit.fair_queue import FairQueue


def drain(queue: FairQueue[str, str], limit: int | None = None) -> list[str]:
    """Remove items in order and return their keys."""
    removed: list[str] = []
    while (key := queue.first()) is not None and len(removed) != limit:
        queue.remove(key)
        removed.append(key)
    return removed


def test_items_of_one_caller_keep_their_order() -> None:
    """The items of one caller are removed in the order in which they were added, whatever they cost."""
    queue: FairQueue[str, str] = FairQueue()
    for number in range(5):
        queue.add(f"a{number}", "", "a", 7.0 - number)
    assert drain(queue) == ["a0", "a1", "a2", "a3", "a4"]


def test_a_new_caller_comes_before_the_second_item_of_a_flood() -> None:
    """An item of a caller that has none waiting comes before all but one item of each other caller."""
    queue: FairQueue[str, str] = FairQueue()
    for number in range(100):
        queue.add(f"a{number}", "", "a", 1.0)
    drain(queue, limit=3)
    queue.add("b0", "", "b", 1.0)
    assert "b0" in drain(queue, limit=2)


def test_weights_divide_the_service() -> None:
    """Callers that always wait are served in proportion to their weights."""
    weights = {"light": 1, "heavy": 3}
    queue: FairQueue[str, str] = FairQueue()
    for caller, weight in weights.items():
        for number in range(100):
            queue.add(f"{caller} {number}", "", caller, 1.0 / weight)
    served = Counter(key.split()[0] for key in drain(queue, limit=80))
    assert served == {"light": 20, "heavy": 60}


@given(
    costs=st.dictionaries(
        st.sampled_from("abc"), st.lists(st.floats(0.1, 50), min_size=12, max_size=12), min_size=2
    )
)
def test_service_differs_by_at_most_one_item(costs: dict[str, list[float]]) -> None:
    """While two callers both wait, the service that they got differs by at most the largest item of each.

    This is the bound of theorem 1 of the paper.
    """
    queue: FairQueue[str, float] = FairQueue()
    for caller, of_caller in costs.items():
        for number, cost in enumerate(of_caller):
            queue.add(f"{caller}{number}", cost, caller, cost)
    served: dict[str, float] = defaultdict(float)
    left = {caller: len(of_caller) for caller, of_caller in costs.items()}
    while all(left.values()):
        key = queue.first()
        assert key is not None
        queued = queue.remove(key)
        served[queued.caller] += queued.item
        left[queued.caller] -= 1
        for (one, costs_of_one), (other, costs_of_other) in permutations(costs.items(), 2):
            assert served[one] - served[other] <= max(costs_of_one) + max(costs_of_other) + 1e-9


def test_an_item_that_is_put_back_keeps_its_place() -> None:
    """An item that was removed and put back comes before the items that came after it."""
    queue: FairQueue[str, str] = FairQueue()
    for key in ("a0", "a1", "b0", "b1"):
        queue.add(key, "", key[0], 1.0)
    first, second = (queue.remove(key) for key in drain_keys(queue, 2))
    queue.put_back("a0", first.item, first.caller, first.position)
    queue.put_back("b0", second.item, second.caller, second.position)
    assert drain(queue) == ["a0", "b0", "a1", "b1"]


def drain_keys(queue: FairQueue[str, str], count: int) -> list[str]:
    return [key for key, _ in queue][:count]


def test_put_back_into_an_emptied_queue() -> None:
    """An item that is put back comes before items that were added after the queue was empty."""
    queue: FairQueue[str, str] = FairQueue()
    for key in ("a0", "a1", "a2"):
        queue.add(key, "", "a", 1.0)
    removed = [queue.remove(key) for key in ("a0", "a1", "a2")]
    queue.put_back("a2", "", "a", removed[2].position)
    queue.add("a3", "", "a", 1.0)
    queue.add("b0", "", "b", 1.0)
    assert drain(queue)[0] == "a2"


def test_callers_can_be_excluded() -> None:
    """The first item of the admitted callers is found behind those of excluded callers."""
    queue: FairQueue[str, str] = FairQueue()
    for key in ("a0", "a1", "b0", "c0"):
        queue.add(key, "", key[0], 1.0)
    assert queue.first(excluded={"a", "b"}) == "c0"
    assert queue.first(only="b") == "b0"
    assert queue.first(excluded={"b"}, only="b") is None
    assert (queue.count_of("a"), queue.count_of("z"), len(queue)) == (2, 0, 4)


def test_an_item_waits_once() -> None:
    """Adding a key that waits has no effect, also on the place of the caller's next item."""
    queue: FairQueue[str, str] = FairQueue()
    for _ in range(3):
        queue.add("a0", "", "a", 5.0)
    queue.add("b0", "", "b", 1.0)
    queue.add("a1", "", "a", 1.0)
    queue.add("b1", "", "b", 1.0)
    assert drain(queue) == ["a0", "b0", "b1", "a1"]
