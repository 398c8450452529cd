import pytest

from gpt_core.errors import InputError
from gpt_core.precision import Precision


@pytest.mark.parametrize(
    ("run", "param", "compute", "wide"),
    [
        ("float64", "float64", "float64", "float64"),
        ("float32", "float32", "float32", "float32"),
        ("bfloat16", "float32", "bfloat16", "float32"),
        ("float16", "float32", "float16", "float32"),
    ],
)
def test_a_run_in_a_dtype_has_its_policy(run: str, param: str, compute: str, wide: str) -> None:
    precision = Precision.of(run)
    assert (precision.param_dtype, precision.compute_dtype, precision.wide_dtype) == (param, compute, wide)


@pytest.mark.parametrize("field", ["param_dtype", "compute_dtype"])
def test_an_unknown_dtype_is_refused_with_the_known(field: str) -> None:
    with pytest.raises(InputError, match=rf"{field} = 'float8' .*float64, float32, bfloat16"):
        Precision(**{field: "float8"})
    with pytest.raises(InputError, match="'float8' must be one of: float64, float32, bfloat16"):
        Precision.of("float8")


def test_parameters_are_not_stored_in_float16() -> None:
    with pytest.raises(InputError, match=r"param_dtype = 'float16' must be one of: float64, float32, bfloat16$"):
        Precision(param_dtype="float16", compute_dtype="float16")


@pytest.mark.parametrize("fields", [{"param_dtype": "float64"}, {"compute_dtype": "float64"}])
def test_float64_goes_with_itself_only(fields: dict[str, str]) -> None:
    with pytest.raises(InputError, match=r"param_dtype = .* with compute_dtype = "):
        Precision(**fields)
