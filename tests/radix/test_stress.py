"""Engines and sidecar are killed at random: `tools/stress_radix --seconds 600` for longer."""

from radix_stress import Stress


def test_random_work_and_random_kills(tmp_path):
    summary = Stress(tmp_path, seed=0).run(seconds=20)
    assert summary["problems"] == []
    for happened in ("blocks_written", "blocks_read", "blocks_poisoned", "hold", "prefetch", "audits"):
        assert summary[happened] > 0, summary
    assert summary["engines_killed"] + summary["sidecars_killed"] + summary["sidecars_stopped"] > 5
