"""The reader of compiled programs, on small programs whose answers are known by hand."""

import pytest

from jax_gpt.plan.hlo import Program
from jax_gpt.plan.hlo_text import replica_groups

# A product of [8, 16] and [16, 4] in a fusion, in a loop of 5, in a loop of 3, and once outside.
LOOPS = """HloModule loops, is_scheduled=true

%product (a.1: f32[8,16], b.1: f32[16,4]) -> f32[8,4] {
  %a.1 = f32[8,16]{1,0:T(8,128)} parameter(0)
  %b.1 = f32[16,4]{1,0:T(8,128)} parameter(1)
  ROOT %dot.1 = f32[8,4]{1,0:T(8,128)} dot(%a.1, %b.1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%inner_body (p.2: (s32[], f32[8,16], f32[16,4])) -> (s32[], f32[8,16], f32[16,4]) {
  %p.2 = (s32[]{:T(128)}, f32[8,16]{1,0}, /*index=2*/f32[16,4]{1,0}) parameter(0)
  %i.2 = s32[] get-tuple-element(%p.2), index=0
  %a.2 = f32[8,16]{1,0} get-tuple-element(%p.2), index=1
  %b.2 = f32[16,4]{1,0} get-tuple-element(%p.2), index=2
  %fusion.2 = f32[8,4]{1,0} fusion(%a.2, %b.2), kind=kOutput, calls=%product, \
backend_config={"window_config":{"estimated_cycles":"100"}}
  %one.2 = s32[] constant(1)
  %next.2 = s32[] add(%i.2, %one.2)
  ROOT %t.2 = (s32[], f32[8,16], f32[16,4]) tuple(%next.2, %a.2, %b.2)
}

%inner_condition (p.3: (s32[], f32[8,16], f32[16,4])) -> pred[] {
  %p.3 = (s32[], f32[8,16]{1,0}, f32[16,4]{1,0}) parameter(0)
  %i.3 = s32[] get-tuple-element(%p.3), index=0
  %limit.3 = s32[] constant(5)
  ROOT %less.3 = pred[] compare(%i.3, %limit.3), direction=LT
}

%outer_body (p.4: (s32[], f32[8,16], f32[16,4])) -> (s32[], f32[8,16], f32[16,4]) {
  %p.4 = (s32[], f32[8,16]{1,0}, f32[16,4]{1,0}) parameter(0)
  %i.4 = s32[] get-tuple-element(%p.4), index=0
  %a.4 = f32[8,16]{1,0} get-tuple-element(%p.4), index=1
  %b.4 = f32[16,4]{1,0} get-tuple-element(%p.4), index=2
  %zero.4 = s32[] constant(0)
  %t.4 = (s32[], f32[8,16], f32[16,4]) tuple(%zero.4, %a.4, %b.4)
  %while.4 = (s32[], f32[8,16], f32[16,4]) while(%t.4), condition=%inner_condition, body=%inner_body
  %two.4 = s32[] constant(2)
  %next.4 = s32[] add(%two.4, %i.4)
  ROOT %u.4 = (s32[], f32[8,16], f32[16,4]) tuple(%next.4, %a.4, %b.4)
}

%outer_condition (p.5: (s32[], f32[8,16], f32[16,4])) -> pred[] {
  %p.5 = (s32[], f32[8,16]{1,0}, f32[16,4]{1,0}) parameter(0)
  %i.5 = s32[] get-tuple-element(%p.5), index=0
  %limit.5 = s32[] constant(7)
  ROOT %less.5 = pred[] compare(%i.5, %limit.5), direction=LT
}

ENTRY %main (a: f32[8,16], b: f32[16,4]) -> f32[8,4] {
  %a = f32[8,16]{1,0} parameter(0)
  %b = f32[16,4]{1,0} parameter(1)
  %start = s32[] constant(1)
  %start_copy = s32[] copy(%start)
  %t = (s32[], f32[8,16], f32[16,4]) tuple(%start_copy, %a, %b)
  %while = (s32[], f32[8,16], f32[16,4]) while(%t), condition=%outer_condition, body=%outer_body
  ROOT %fusion = f32[8,4]{1,0} fusion(%a, %b), kind=kOutput, calls=%product, \
backend_config={"window_config":{"estimated_cycles":"7"}}
}
"""
ONE_PRODUCT = 2 * 8 * 16 * 4
OUTER, INNER = 3, 5  # 1, 3, 5 are below 7; 0 to 4 below 5


def test_products_and_cycles_count_with_the_trips_of_their_loops() -> None:
    program = Program(LOOPS)
    assert program.matmul_flops() == ONE_PRODUCT * (OUTER * INNER + 1)
    assert program.cycles() == 100 * OUTER * INNER + 7
    assert program.unknown_loops == set()


def test_a_noted_trip_count_wins() -> None:
    noted = LOOPS.replace(
        "body=%inner_body", 'body=%inner_body, backend_config={"known_trip_count":{"n":"11"},"x":"0"}'
    )
    assert Program(noted).matmul_flops() == ONE_PRODUCT * (OUTER * 11 + 1)


def test_a_loop_that_cannot_be_counted_is_named() -> None:
    unknown = LOOPS.replace("%limit.3 = s32[] constant(5)", "%limit.3 = s32[] custom-call(%i.3)")
    program = Program(unknown)
    assert program.matmul_flops() == ONE_PRODUCT * (OUTER + 1)
    assert program.unknown_loops == {"while.4"}


def test_a_limit_that_counts_itself_in_takes_one_trip_more() -> None:
    assert Program(LOOPS.replace("%limit.3), direction=LT", "%limit.3), direction=LE")).matmul_flops() == (
        ONE_PRODUCT * (OUTER * 6 + 1)
    )


def entry(body: str, before: str = "") -> Program:
    return Program(f"HloModule m\n\n{before}\nENTRY %main (x: f32[4]) -> f32[4] {{\n{body}\n}}\n")


@pytest.mark.parametrize(
    ("left", "right", "result", "attributes", "flops"),
    [
        # A plain product of [10, 6] and [6, 7].
        ("10,6", "6,7", "10,7", "dim_labels=bf_io->bf", 2 * 10 * 6 * 7),
        # Heads as a window: each of the 8 results sees one of 8 kernel positions, the rest is padding.
        (
            "10,6,1",
            "6,8,7",
            "10,8,7",
            "window={size=8 pad=7_7 rhs_reversal=1}, dim_labels=bf0_i0o->b0f",
            2 * 10 * 6 * 7 * 8,
        ),
        # A window of 3 over 5 positions with padding of 1: 3 + 3 + 3 full ones and two of 2.
        ("2,5,3", "3,3,4", "2,5,4", "window={size=3 pad=1_1}, dim_labels=b0f_0io->b0f", 2 * 2 * 3 * 4 * 13),
        # Every second position.
        ("2,5,3", "3,3,4", "2,2,4", "window={size=3 stride=2}, dim_labels=b0f_0io->b0f", 2 * 2 * 3 * 4 * 6),
    ],
)
def test_convolutions_count_the_pairs_that_meet(
    left: str, right: str, result: str, attributes: str, flops: int
) -> None:
    program = entry(
        f"  %l = bf16[{left}]{{1,0}} parameter(0)\n  %r = bf16[{right}]{{1,0}} parameter(1)\n"
        f"  ROOT %c = bf16[{result}]{{1,0}} convolution(%l, %r), {attributes}"
    )
    assert program.matmul_flops() == flops


GROUPS = "replica_groups={{0,1,2,3},{4,5,6,7}}"
KB = 4 * 256
RAGGED_KIND = "ragged-all-to-all"


@pytest.mark.parametrize(
    ("line", "kind", "sent"),
    [
        (f"%g = f32[1024]{{0}} all-gather(%x), {GROUPS}, dimensions={{0}}", "all-gather", 4 * KB * 3 / 4),
        (f"%g = f32[64]{{0}} reduce-scatter(%x), {GROUPS}, dimensions={{0}}", "reduce-scatter", KB * 3 / 4),
        (f"%g = f32[256]{{0}} all-reduce(%x), {GROUPS}, to_apply=%add", "all-reduce", 2 * KB * 3 / 4),
        (f"%g = f32[256]{{0}} all-to-all(%x), {GROUPS}", "all-to-all", KB * 3 / 4),
        # Where it arrives there is room for the worst case; sent is what there is, if all devices get as much.
        (
            f"%g = f32[2048]{{0}} ragged-all-to-all(%x, %room, %i, %i, %i, %i), {GROUPS}",
            "ragged-all-to-all",
            KB * 3 / 4,
        ),
        (f"%g = f32[256]{{0}} ragged-all-to-all(%room, %x, %i, %i, %i, %i), {GROUPS}", "ragged-all-to-all", KB * 3 / 4),
        ("%g = f32[256]{0} collective-permute(%x), source_target_pairs={{0,1},{1,0}}", "collective-permute", KB),
        (
            f"%g = (f32[256]{{0}}, f32[256]{{0}}) all-reduce(%x, %x), {GROUPS}, to_apply=%add",
            "all-reduce",
            2 * 2 * KB * 3 / 4,
        ),
        (f"%g = (f32[256]{{0}}, f32[1024]{{0}}) all-gather-start(%x), {GROUPS}", "all-gather", 4 * KB * 3 / 4),
    ],
)
def test_what_a_device_sends_is_that_of_a_ring(line: str, kind: str, sent: float) -> None:
    inputs = ("%x = f32[256]{0} parameter(0)", "%room = f32[2048]{0} parameter(1)", "%i = s32[4]{0} parameter(2)")
    program = entry("\n".join(f"  {line}" for line in (*inputs, f"ROOT {line}")))
    (found,) = program.collectives()
    assert (found.kind, found.wire_bytes, found.times) == (kind, sent, 1)
    assert found.hidden == ("start" in line)


@pytest.mark.parametrize(
    ("kind", "target", "expected", "slices", "sent"),
    [
        ("ALL_REDUCE", "{1,2}x{0:3}", "all-reduce", 2, 2 * KB / 2),
        ("REDUCE_SCATTER", "{1:4}x{0:255}", "reduce-scatter", 4, KB * 3 / 4),
        ("ALL_GATHER", "{0,2:3}x{0}", "all-gather", 3, 3 * KB * 2 / 3),
        ("ONE_TO_ONE", "{1,2}x{0:3}", "collective-permute", 2, KB),
    ],
)
def test_what_goes_to_other_slices_is_sent_through_the_host(
    kind: str, target: str, expected: str, slices: int, sent: float
) -> None:
    program = entry(
        "  %x = f32[256]{0:T(256)} parameter(0)\n  %token = token[] after-all()\n"
        "  %s = (f32[256]{0:T(256)}, u32[]{:S(2)}, token[]) send(%x, %token), channel_id=4, is_host_transfer=true, "
        'frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",'
        f'_xla_megascale_target="{target}",_xla_megascale_transfer_type="{kind}"}}\n'
        "  ROOT %d = token[] send-done(%s), channel_id=4, is_host_transfer=true"
    )
    (found,) = program.collectives()
    assert (found.kind, len(found.groups[0]), found.wire_bytes) == (expected, slices, sent)
    assert found.between_slices
    assert not found.hidden


PARTS = """
%started (x.1: f32[256]) -> (f32[256], f32[1024]) {
  %x.1 = f32[256]{0} parameter(0)
  %gather.1 = f32[1024]{0} all-gather(%x.1), replica_groups={{0,1,2,3}}, dimensions={0}
  ROOT %start.1 = (f32[256]{0}, f32[1024]{0}) custom-call(%gather.1), custom_call_target="AsyncCollectiveStart"
}

%async_collective_fusion.3 (x.2: f32[256]) -> f32[1024] {
  %x.2 = f32[256]{0} parameter(0)
  ROOT %gather.2 = f32[1024]{0} all-gather(%x.2), replica_groups={{0,1,2,3}}, dimensions={0}
}

%ended (x.3: f32[256]) -> f32[1024] {
  %x.3 = f32[256]{0} parameter(0)
  %gather.3 = f32[1024]{0} all-gather(%x.3), replica_groups={{0,1,2,3}}, dimensions={0}
  ROOT %done.3 = f32[1024]{0} custom-call(%x.3, %gather.3), custom_call_target="AsyncCollectiveDone"
}

%all-reduce-scatter.7 (x.4: f32[256]) -> f32[64] {
  %x.4 = f32[256]{0} parameter(0)
  %sum.4 = f32[256]{0} all-reduce(%x.4), replica_groups={{0,1,2,3}}, to_apply=%add
  %zero.4 = s32[] constant(0)
  ROOT %cut.4 = f32[64]{0} dynamic-slice(%sum.4, %zero.4), dynamic_slice_sizes={64}
}
"""


def test_one_gather_in_three_parts_counts_once_and_a_cut_sum_is_a_reduce_scatter() -> None:
    program = entry(
        "  %x = f32[256]{0} parameter(0)\n"
        "  %a = (f32[256]{0}, f32[1024]{0}) fusion(%x), kind=kCustom, calls=%started\n"
        "  %b = f32[1024]{0} fusion(%x), kind=kOutput, calls=%async_collective_fusion.3\n"
        "  %c = f32[1024]{0} fusion(%x), kind=kCustom, calls=%ended\n"
        "  ROOT %d = f32[64]{0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.7",
        PARTS,
    )
    found = [(one.kind, one.wire_bytes, one.hidden) for one in program.collectives()]
    assert found == [("all-gather", 4 * KB * 3 / 4, True), ("reduce-scatter", KB * 3 / 4, False)]


def test_a_collective_in_a_computation_that_is_started_is_hidden() -> None:
    program = entry(
        "  %x = f32[256]{0} parameter(0)\n"
        "  %s = ((f32[256]{0}), f32[256]{0}) async-start(%x), calls=%wrapped\n"
        "  ROOT %d = f32[256]{0} async-done(%s)",
        "%wrapped (x.1: f32[256]) -> f32[256] {\n  %x.1 = f32[256]{0} parameter(0)\n"
        f"  ROOT %g = f32[256]{{0}} all-to-all(%x.1), {GROUPS}\n}}\n",
    )
    assert [one.hidden for one in program.collectives()] == [True]


# Of 40 rows in 4 groups, [40, 6] with [4, 6, 7]: as a window of groups, of which the compiler computes one a row ...
RAGGED = (
    "  %l = bf16[40,6]{1,0} parameter(0)\n  %r = bf16[4,6,7]{2,1,0} parameter(1)\n"
    "  %p = bf16[4,40,6]{2,1,0} broadcast(%l), dimensions={1,2}\n"
    "  ROOT %c = bf16[4,40,7]{2,1,0} convolution(%p, %r), window={size=4 stride=3 lhs_dilate=4}, "
    'dim_labels=0bf_0io->0bf, metadata={op_name="jit(step)/ragged_dot_general"}, '
    'backend_config={"estimated_cycles":"9223372036854775807"}'
)
# ... or as a kernel, beside which another one counts; and the gradient of its second factor.
RAGGED_KERNELS = (
    "  %s = s32[4]{0} parameter(0)\n  %l = bf16[40,6]{1,0} parameter(1)\n  %r = bf16[4,6,7]{2,1,0} parameter(2)\n"
    "  %o = bf16[40,7]{1,0} parameter(3)\n"
    '  %m = s32[4]{0} custom-call(%s), custom_call_target="tpu_custom_call", metadata={op_name="ragged-dot-metadata"}\n'
    '  %k = bf16[40,7]{1,0} custom-call(%m, %l, %r), custom_call_target="tpu_custom_call", '
    'metadata={op_name="jit(step)/ragged_dot_general/ragged-dot-none"}\n'
    '  ROOT %g = bf16[4,6,7]{2,1,0} custom-call(%m, %l, %o), custom_call_target="tpu_custom_call", '
    'metadata={op_name="jit(step)/ragged_dot_general/ragged-dot-none"}'
)


@pytest.mark.parametrize(("body", "products"), [(RAGGED, 1), (RAGGED_KERNELS, 2)])
def test_products_of_groups_are_counted_apart_with_one_group_a_row(body: str, products: int) -> None:
    program = entry(body)
    assert program.ragged_flops() == products * 2 * 40 * 6 * 7
    assert program.matmul_flops() == 0
    assert program.kernels() == []
    assert program.cycles() == 0


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("replica_groups={{0,2},{1,3}}, x", ((0, 2), (1, 3))),
        ("replica_groups=[2,3]<=[6]", ((0, 1, 2), (3, 4, 5))),
        ("replica_groups=[3,2]<=[2,3]T(1,0)", ((0, 3), (1, 4), (2, 5))),
        ("replica_groups=mesh['axis_0'=4] {'axis_0'}", ((0, 1, 2, 3),)),
        ("replica_groups=mesh['a'=2,'b'=3] {'a'}, x", ((0, 3), (1, 4), (2, 5))),
        ("replica_groups=mesh['a'=2,'b'=3] {'b'}, x", ((0, 1, 2), (3, 4, 5))),
    ],
)
def test_groups_are_read_in_every_form(text: str, groups: tuple[tuple[int, ...], ...]) -> None:
    assert replica_groups(text) == groups


def test_kernels_are_found_though_their_metadata_breaks_lines() -> None:
    program = entry(
        "  %q = bf16[4,128,64]{2,1,0:T(8,128)(2,1)} parameter(0)\n"
        '  ROOT %k.3 = (bf16[4,128,64]{2,1,0}, f32[4,128]{1,0}) custom-call(%q), custom_call_target="tpu_custom_call", '
        "frontend_attributes={kernel_metadata={\n"
        '"xprof_metadata":"{\\"block_q\\": 128}"\n'
        '}}, metadata={op_name="jit(step)/splash_mha_dq_no_residuals/pallas_call"}'
    )
    (kernel,) = program.kernels()
    assert (kernel.name, kernel.operands[0].dims, kernel.times) == ("splash_mha_dq_no_residuals", (4, 128, 64), 1)


def test_a_text_without_a_program_is_refused() -> None:
    with pytest.raises(ValueError, match="no ENTRY"):
        Program("HloModule nothing")
