"""Each source has its share of a mix, and no row comes again before all have come."""

from collections import Counter

from weitiao.data.rows.mix import mix
from weitiao.data.rows.row import Row


def sources(*sizes):
    return [[Row({"n": n}, f"{i}.jsonl", n + 1) for n in range(size)] for i, size in enumerate(sizes)]


def taken(rows):
    return Counter(row.file for row in rows)


def test_without_shares_all_rows_come_one_after_the_other():
    one, two = sources(3, 2)
    assert mix([one, two], [None, None], seed=1) == one + two


def test_with_shares_the_total_stays_and_the_counts_follow_the_shares():
    assert taken(mix(sources(10, 90), [1, 3], seed=1)) == {"0.jsonl": 25, "1.jsonl": 75}
    assert taken(mix(sources(4, 3, 3), [1, 1, 1], seed=1)) == {"0.jsonl": 4, "1.jsonl": 3, "2.jsonl": 3}
    assert taken(mix(sources(5, 5), [0, 2.5], seed=1)) == {"1.jsonl": 10}


def test_no_row_comes_again_before_all_have_come():
    rows = [row for row in mix(sources(10, 90), [1, 3], seed=1) if row.file == "0.jsonl"]
    assert set(Counter(row.line for row in rows).values()) == {2, 3}
    assert len({row.line for row in rows[:10]}) == len({row.line for row in rows[10:20]}) == 10
    assert rows[:10] != rows[10:20]


def test_a_mix_is_the_same_for_the_same_seed_and_another_for_another():
    first, again, other = (mix(sources(50, 50), [1, 1], seed=seed) for seed in (7, 7, 8))
    assert first == again != other
