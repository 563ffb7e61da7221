import stat

import numpy as np
import pytest

from silotune.components.learning.leakage.canaries import REFERENCES, canaries, coins, planted

KEY = bytes(range(32))


def test_they_follow_from_the_key_and_from_nothing_else():
    assert canaries(KEY, 5) == canaries(KEY, 9)[:5]
    assert not {c.code for c in canaries(KEY, 50)} & {c.code for c in canaries(bytes(32), 50)}
    assert np.array_equal(coins(KEY, 5), coins(KEY, 9)[:5])


def test_secrets_and_coins_look_random():
    made = canaries(KEY, 3000)
    digits = np.array([[int(d) for d in c.code] for c in made])
    assert np.abs(np.bincount(digits.ravel(), minlength=10) / digits.size - 0.1).max() < 0.01
    assert len({c.code for c in made}) == 3000
    assert coins(KEY, 4000).mean() == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize(("kind", "fields"), [("prompt-response", {"prompt", "response"}), ("chat", {"messages"}), ("text", {"text"})])
def test_a_canary_is_a_record_of_its_format_and_of_a_person_of_its_own(kind, fields):
    made = [c.record(kind) for c in canaries(KEY, 2)]
    assert all(set(record) == fields | {"person"} for record in made)
    assert made[0]["person"] != made[1]["person"]
    assert canaries(KEY, 1)[0].code in str(made[0])


def test_a_silo_plants_from_its_own_secret(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    found = planted(one, 20)
    assert planted(one, 20).digest == found.digest != planted(two, 20).digest
    assert len(found.canaries) == 20 + REFERENCES
    assert sorted([*found.into, *found.out]) == list(range(20 + REFERENCES))
    assert len(found.included) == found.coins.sum()
    assert stat.S_IMODE((one / "secrets" / "noise.key").stat().st_mode) == 0o600
