"""The estimate of a run's time left."""

from recipes.metrics import TimeLeft
from recipes.schedule import Span


def test_time_left_is_from_all_steps_of_each_kind_of_phase():
    dense_phase, sparse_phase, other = ("dense", None), ("sparse", None), ("sparse", 0.5)
    left = TimeLeft([Span("dense", 0, 100), Span("sparse", 100, 300), Span("dense", 300, 400)])
    left.add(dense_phase, 1, 90.0)  # the first step is slow: it counts only as long as there is no other
    assert left.after(1) == 399 * 90.0
    left.add(dense_phase, 9, 18.0)
    assert left.after(10) == 390 * 2.0
    left.add(dense_phase, 90, 360.0)
    dense = 378.0 / 99
    assert left.after(100) == 300 * dense
    left.add(sparse_phase, 10, 500.0, compiled=True)
    assert left.after(110) == 290 * dense, "a row in which graphs were compiled is no guide"
    left.add(sparse_phase, 10, 10.0)
    assert left.after(120) == 180 * 1.0 + 100 * dense
    assert left.after(400) == 0.0
    left = TimeLeft([Span("dense", 0, 10), Span("sparse", 10, 20), Span("sparse", 20, 30, 0.5), Span("dense", 30, 40)])
    left.add(dense_phase, 1, 50.0)
    left.add(dense_phase, 9, 90.0)
    left.add(sparse_phase, 5, 10.0)
    assert left.after(15) == 5 * 2.0 + 10 * 2.0 + 10 * 10.0, "another share is as slow as the sparse steps so far"
    left.add(sparse_phase, 5, 10.0)
    left.add(other, 5, 15.0)
    assert left.after(25) == 5 * 3.0 + 10 * 10.0
