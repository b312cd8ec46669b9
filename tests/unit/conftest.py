# SPDX-License-Identifier: Apache-2.0
"""Settings of the property tests."""

from __future__ import annotations

from hypothesis import settings

# No deadline for one example: on a machine that others use too it fails by chance.
settings.register_profile("unit", deadline=None)
settings.load_profile("unit")
