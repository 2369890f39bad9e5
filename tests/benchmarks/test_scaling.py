"""What travels between devices: read from HLO, and what the committed rows say of it."""

import pathlib

import pytest

from lwsam_bench.pages.docs import marks
from lwsam_bench.scaling import programs, run, table
from lwsam_bench.support import hlo
from lwsam_bench.support.rows import read_rows


ROOT = pathlib.Path(__file__).resolve().parents[2]
COMMITTED = ROOT / "benchmarks" / "results" / "scaling"
WEIGHTS = programs.DEPTH * programs.WIDTH**2 * 4  # bytes of all layers
SMALL = 1024  # bytes of losses, norms and numbers, at most

# As XLA writes them: layouts, tuples, comments, groups in two ways.
SNIPPETS = {
    "all-reduce": (
        "  %all-reduce.1 = f32[16,8]{1,0} all-reduce(%dot.3), channel_id=1,"
        " replica_groups={{0,1,2,3}}, use_global_device_ids=true, to_apply=%add",
        16 * 8 * 4,
    ),
    "all-reduce of a tuple": (
        "  ROOT %all-reduce = (f32[16]{0}, bf16[4,2]{1,0:T(8,128)(2,1)}, f32[])"
        " all-reduce(%a, %b, %c), channel_id=2, replica_groups=[1,4]<=[4], to_apply=%add",
        16 * 4 + 8 * 2 + 4,
    ),
    "all-reduce in the background": (
        "  %all-reduce-start = (f32[8]{0}, f32[2]{0}) all-reduce-start(%a, %b),"
        " replica_groups={{0,1}}, to_apply=%add",
        10 * 4,
    ),
    "its end": (
        "  %all-reduce-done = (f32[8]{0}, f32[2]{0}) all-reduce-done(%all-reduce-start)",
        None,
    ),
    "all-gather": (
        "%all-gather = f32[64,8]{1,0} all-gather(%param.1), dimensions={0},"
        " replica_groups=[2,4]<=[8]",
        64 * 8 * 4,
    ),
    "all-gather in the background": (
        "  %ag = (f32[16,8]{1,0}, f32[64,8]{1,0}) all-gather-start(%param.1),"
        " dimensions={0}",
        64 * 8 * 4,
    ),
    "of several, in the background": (
        "  %ag = ((f32[2], s8[3]), (f32[8]{0}, /*index=1*/s8[12]{0}), u32[], u32[])"
        " all-gather-start(%a, %b), dimensions={0}",
        8 * 4 + 12,
    ),
    "reduce-scatter": (
        "  %reduce-scatter = f32[16,8]{1,0} reduce-scatter(%dot), channel_id=3,"
        " replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}, to_apply=%add",
        4 * 16 * 8 * 4,
    ),
    "reduce-scatter of a tuple": (
        "  %rs = (bf16[4], f32[2]) reduce-scatter(%a, %b), replica_groups=[2,8]<=[16],"
        " dimensions={0}, to_apply=%add",
        8 * (4 * 2 + 2 * 4),
    ),
    "all-to-all": (
        "  %all-to-all.2 = (f32[1,4]{1,0}, f32[1,4]{1,0}) all-to-all(%x, %y),"
        " replica_groups={{0,1}}",
        2 * 4 * 4,
    ),
    "collective-permute": (
        "  %collective-permute = pred[5,2]{1,0} collective-permute(%x), channel_id=4,"
        " source_target_pairs={{0,1},{1,0}}",
        10,
    ),
    "collective-permute in the background": (
        "  %cp = (f32[6]{0}, f32[6]{0}, u32[], u32[]) collective-permute-start(%x),"
        " source_target_pairs={{0,1},{1,0}}",
        6 * 4,
    ),
    "small kinds": (
        "  %a = (s4[8], f8e4m3fn[3], c64[2]) all-reduce(%x, %y, %z)",
        4 + 3 + 16,
    ),
    "another operation that reads one": (
        "  %fusion = f32[16]{0} fusion(%all-reduce.1), calls=%all-reduce_comp",
        None,
    ),
    "a name": ("%all-gather.clone (param_0: f32[4]) -> f32[4] {", None),
    "metadata": (
        '  %add = f32[] add(%a, %b), metadata={op_name="x = f32[2] all-reduce(y)"}',
        None,
    ),
}


@pytest.mark.parametrize("name", SNIPPETS)
def test_each_form_of_a_collective(name):
    line, expected = SNIPPETS[name]
    found = hlo.collectives(f"HloModule m\n\n{line}\n  %c = f32[] constant(0)\n")
    assert [x.bytes for x in found] == ([] if expected is None else [expected])


def test_bytes_are_added_up_by_kind():
    text = "\n".join(line for line, _ in SNIPPETS.values())
    sizes = hlo.bytes_by_kind(text)
    assert set(sizes) == set(hlo.KINDS[:4]) | {"collective-permute"}
    assert sizes["collective-permute"] == 10 + 24
    assert sum(sizes.values()) == sum(n for _, n in SNIPPETS.values() if n)


@pytest.mark.slow
def test_two_devices_and_two_processes(command, tmp_path):
    code, output = command.run("scaling", "--smoke", "--out", tmp_path)
    assert code == 0, output
    text = (tmp_path / run.TABLE).read_text()
    assert text.strip() in output
    assert "With 2 processes of one device each, the same to the byte." in text
    holds(list(read_rows(tmp_path / run.ROWS)))


def holds(rows):
    """What rows must say, whichever there are: by layout, method and place."""
    found = {
        (row["layout"], row["method"], row["processes"], row["devices"]): row
        for row in rows
        if row["kind"] == "program"
    }
    share = {"layer-wise, last 2 of 6": 1 / 3, "layer-wise, first 2 of 6": 1 / 3}
    share |= {"SGD": 0, "SAM along the momentum": 0}
    for (layout, method, processes, devices), row in found.items():
        moved = table.total(row)
        if devices == 1:
            assert moved == 0
            continue
        # Gradients are reduced, and once more those of perturbed layers; sharded
        # weights are gathered before.
        once = WEIGHTS * (2 if layout == "FSDP" else 1)
        expected = once * (1 + share.get(method, 1))
        assert moved == pytest.approx(expected, abs=SMALL), (method, layout)
        sgd = found[layout, "SGD", processes, devices]
        assert row["flops"] >= sgd["flops"]
    return found


def test_the_committed_rows_and_the_page():
    rows = list(read_rows(COMMITTED / run.ROWS))
    found = holds(rows)
    places = {(1, 1), (1, 2), (1, 4), (1, 8), (2, 2), (4, 4)}
    assert {key[2:] for key in found} == places
    assert {key[:2] for key in found} == {
        (layout, method) for layout in programs.LAYOUTS for method in programs.METHODS
    }
    assert not rows[0]["dirty"]
    text = table.markdown(rows)
    assert "the same to the byte" in text
    assert (COMMITTED / run.TABLE).read_text() == text
    opening, closing = marks(table.MARK)
    page = (ROOT / "docs" / table.PAGE).read_text()
    assert page.split(opening)[1].split(closing)[0].strip() == text.strip()
