"""How attention over long contexts is cut: as many programs as the device runs at once, and no more."""

from trtlab.ops.cuda.launch_shape import power_of_two, split_count, width_of


def test_split_count_fills_the_device_once():
    assert 30 <= split_count(programs=8, tiles=2048, slots=264) <= 33
    assert split_count(programs=128, tiles=2048, slots=264) == 2
    assert split_count(programs=4096, tiles=2048, slots=264) == 1
    assert split_count(programs=300, tiles=2048, slots=264, room=1) == 1
    assert split_count(programs=64, tiles=128, slots=132, merge=8) == 2
    assert split_count(programs=32, tiles=4, slots=132, merge=4) == 1
    assert split_count(programs=8, tiles=1, slots=264) == 1
    assert split_count(programs=8, tiles=0, slots=264) == 1


def test_sizes_are_rounded_up_to_what_a_program_takes():
    assert [power_of_two(number) for number in (1, 2, 3, 8, 9)] == [1, 2, 4, 8, 16]
    assert [width_of(size) for size in (8, 16, 96, 128)] == [16, 16, 128, 128]
