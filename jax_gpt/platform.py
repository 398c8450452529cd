"""What kind of device a program is traced for, which need not be here."""

import jax


def platform() -> str:
    """What programs are traced for: "cpu", "gpu" or "tpu"; the devices of the mesh around, which need not be here."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else str(device.platform)
