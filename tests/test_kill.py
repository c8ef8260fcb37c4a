"""A killed run resumes by itself and ends as one that never was: the short version of `python tests/kill.py`."""

import kill


def test_killed_runs_end_as_the_uninterrupted_one(script, tmp_path):
    kill.prepare(tmp_path)
    moments = kill.kill_at_random(script.__name__, tmp_path, steps=200, kills=2)
    assert len(moments) == 2
