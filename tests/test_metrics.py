"""The estimate of a run's time left."""

from recipes.metrics import TimeLeft
from recipes.schedule import Span


def test_time_left_is_from_all_steps_of_each_mode():
    left = TimeLeft([Span("dense", 0, 100), Span("sparse", 100, 300), Span("dense", 300, 400)])
    left.add("dense", 1, 90.0)  # the first step is slow: it counts only as long as there is no other
    assert left.after(1) == 399 * 90.0
    left.add("dense", 9, 18.0)
    assert left.after(10) == 390 * 2.0
    left.add("dense", 90, 360.0)
    dense = 378.0 / 99
    assert left.after(100) == 300 * dense
    left.add("sparse", 10, 500.0, compiled=True)
    assert left.after(110) == 290 * dense, "a row in which graphs were compiled is no guide"
    left.add("sparse", 10, 10.0)
    assert left.after(120) == 180 * 1.0 + 100 * dense
    assert left.after(400) == 0.0
