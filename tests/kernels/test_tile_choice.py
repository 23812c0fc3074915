"""The choice among tiles and its cache on disk, with a timing function of the test's own."""

from __future__ import annotations

import json
import warnings

import pytest
import torch

pytest.importorskip("triton")
from tcopd_kernels import _tile_cache, _triton_tiles
from tcopd_kernels._triton_tiles import Tile, choose_tile
from triton.runtime.errors import OutOfResources

TILES = [Tile(128, 128, 64, 8, 4), Tile(128, 256, 64, 8, 3), Tile(128, 128, 64, 8, 4, flatten=True)]
KEY = ("some GPU", "3.9.0", "forward", torch.bfloat16, 8192, 131072, 4096, False)


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    monkeypatch.setenv("TCOPD_KERNELS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(_tile_cache, "_warned", False)
    forget(monkeypatch)


def forget(monkeypatch):
    """As a new process would begin."""
    monkeypatch.setattr(_triton_tiles, "_chosen", {})
    monkeypatch.setattr(_triton_tiles, "_failed", set())


class Launch:
    """Records launches and timings; `fails` raise, `wrong` write another result."""

    def __init__(self, monkeypatch, times_ms, fails=None, wrong=()):
        self.times_ms, self.fails, self.wrong = times_ms, fails or {}, wrong
        self.seen: list[Tile] = []
        self.timed: list[Tile] = []
        self.output = torch.zeros(3)
        monkeypatch.setattr(_triton_tiles, "measure_ms", self.measure)

    def __call__(self, tile):
        self.seen.append(tile)
        if tile in self.fails:
            raise self.fails[tile]
        self.output.copy_(torch.tensor([1.0, float("-inf"), 5.0 if tile in self.wrong else 2.0]))

    def measure(self, run):
        run()
        self.timed.append(self.seen[-1])
        return self.times_ms[TILES.index(self.seen[-1])]


def test_the_fastest_tile_is_chosen_once_and_survives_the_process(monkeypatch):
    launch = Launch(monkeypatch, [3.0, 1.0, 2.0])
    assert choose_tile(KEY, TILES, launch, [launch.output]) == TILES[1]
    assert launch.timed == TILES
    again = Launch(monkeypatch, [1.0, 1.0, 1.0])
    assert choose_tile(KEY, TILES, again) == TILES[1] and not again.seen
    forget(monkeypatch)
    assert choose_tile(KEY, TILES, again) == TILES[1] and not again.seen
    assert choose_tile((*KEY[:-1], True), TILES, again, [again.output]) == TILES[0] and again.timed == TILES


def test_a_stored_tile_that_is_no_longer_a_candidate_is_timed_anew(monkeypatch):
    choose_tile(KEY, TILES, Launch(monkeypatch, [3.0, 1.0, 2.0]))
    forget(monkeypatch)
    launch = Launch(monkeypatch, [3.0, 1.0, 2.0])
    assert choose_tile(KEY, [TILES[0], TILES[2]], launch, [launch.output]) == TILES[2]


@pytest.mark.parametrize(
    "error", [OutOfResources(300, 200, "shared memory"), RuntimeError("PassManager::run failed")], ids=str
)
def test_a_tile_that_does_not_compile_is_left_out_and_remembered(monkeypatch, error):
    launch = Launch(monkeypatch, [3.0, 1.0, 2.0], {TILES[1]: error})
    assert choose_tile(KEY, TILES, launch, [launch.output]) == TILES[2]
    assert launch.timed == [TILES[0], TILES[2]]
    assert _triton_tiles._failed == {(KEY, TILES[1])}


def test_other_errors_are_not_hidden(monkeypatch):
    for error in (RuntimeError("CUDA error: an illegal memory access"), ValueError("no")):
        with pytest.raises(type(error), match=str(error)):
            choose_tile(KEY, TILES, Launch(monkeypatch, [3.0, 1.0, 2.0], {TILES[1]: error}))


def test_no_tile_left_is_an_error(monkeypatch):
    fails = dict.fromkeys(TILES, OutOfResources(300, 200, "shared memory"))
    with pytest.raises(RuntimeError, match=r"no tile of the kernel 'forward'") as caught:
        choose_tile(KEY, TILES, Launch(monkeypatch, [1.0, 1.0, 1.0], fails))
    assert isinstance(caught.value.__cause__, OutOfResources)


def test_a_flattened_tile_with_another_result_is_refused(monkeypatch):
    launch = Launch(monkeypatch, [3.0, 2.0, 1.0], wrong=[TILES[2]])
    assert choose_tile(KEY, TILES, launch, [launch.output]) == TILES[1]
    assert (KEY, TILES[2]) in _triton_tiles._failed


@pytest.mark.parametrize("content", ["{", "[1, 2]", '{"key": 3}', "\0\0"])
def test_a_damaged_cache_is_ignored_with_one_warning_and_replaced(monkeypatch, content):
    path = _tile_cache.cache_path()
    path.parent.mkdir(parents=True)
    path.write_text(content)
    with pytest.warns(UserWarning, match="tiles are timed in every process") as seen:
        for entropy in (False, True):
            choose_tile((*KEY[:-1], entropy), TILES, Launch(monkeypatch, [3.0, 1.0, 2.0]))
    assert len(seen) == 1
    assert len(json.loads(path.read_text())) == 2


def test_a_cache_that_cannot_be_written_is_ignored_with_one_warning(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TCOPD_KERNELS_CACHE", str(tmp_path / "file" / "folder"))
    with pytest.warns(UserWarning, match="cannot be") as seen:
        assert choose_tile(KEY, TILES, Launch(monkeypatch, [3.0, 1.0, 2.0])) == TILES[1]
    assert len(seen) == 1


def test_saving_leaves_other_choices_and_no_scraps(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _tile_cache.save("a", {"block_m": 1})
        _tile_cache.save("b", {"block_m": 2})
        assert _tile_cache.load() == {"a": {"block_m": 1}, "b": {"block_m": 2}}
    assert [path.name for path in _tile_cache.cache_path().parent.iterdir()] == [f"tiles-{_tile_cache.VERSION}.json"]


def test_the_cache_lies_in_the_home_folder_by_default(monkeypatch, tmp_path):
    monkeypatch.delenv("TCOPD_KERNELS_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert _tile_cache.cache_path() == tmp_path / ".cache" / "tcopd_kernels" / f"tiles-{_tile_cache.VERSION}.json"


@pytest.mark.parametrize("arch", [80, 86, 90, 100, 120, "gfx90a", "gfx942"])
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("N", [1, 64, 65, 8192])
def test_every_architecture_has_a_plain_default_that_fits_a_bound_block(arch, itemsize, N):
    from tcopd_kernels._triton_forward import BOUND_ROWS

    for heavy in (False, True):
        forward = _triton_tiles.forward_tiles(arch, itemsize, N, False, heavy)
        dlogits = _triton_tiles.dlogits_tiles(arch, itemsize, N, False, heavy)
        assert not forward[0].flatten and not any(tile.flatten for tile in dlogits)
        assert len(set(forward)) == len(forward)
        if heavy:
            assert all(BOUND_ROWS % tile.block_m == 0 for tile in forward)


class TestPickTile:
    """pick_tile as on an H100, whose properties are given."""

    @pytest.fixture(autouse=True)
    def gpu(self, monkeypatch):
        self.capturing = False
        monkeypatch.setattr(_triton_tiles, "INTERPRETED", False)
        monkeypatch.setattr(_triton_tiles, "device_limits", lambda device: (90, 132, self.shared_bytes))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "some GPU")
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.capturing)
        monkeypatch.setattr(_triton_tiles, "measure_ms", self.measure)
        self.shared_bytes = 227 << 10
        self.seen: list[Tile] = []

    def measure(self, run):
        run()
        return -self.seen[-1].block_n

    def pick(self, N=8192, V=5000, **options):
        self.seen.clear()
        hidden, weight = torch.empty(N, 64, dtype=torch.bfloat16), torch.empty(V, 64, dtype=torch.bfloat16)
        return _triton_tiles.pick_tile("kernel", hidden, weight, False, self.seen.append, **options)

    def test_rows_of_one_bucket_share_a_choice_and_other_sizes_do_not(self):
        assert self.pick().block_n == 256 and self.seen
        assert self.pick(N=5000).block_n == 256 and not self.seen
        assert self.pick(V=4000).block_n == 256 and self.seen
        assert self.pick(V=3000, vocab=4000).block_n == 256 and not self.seen

    def test_nothing_is_timed_where_results_must_not_depend_on_time(self):
        torch.use_deterministic_algorithms(True)
        try:
            assert self.pick().block_n == 128 and not self.seen
        finally:
            torch.use_deterministic_algorithms(False)

    def test_a_capture_takes_the_known_tile_or_the_default(self):
        self.capturing = True
        assert self.pick().block_n == 128 and not self.seen
        self.capturing = False
        self.pick()
        self.capturing = True
        assert self.pick().block_n == 256 and not self.seen

    def test_tiles_that_do_not_fit_are_never_launched(self):
        self.shared_bytes = 99 << 10
        tile = self.pick()
        assert tile.shared_bytes(2) <= 99 << 10 and not self.seen
