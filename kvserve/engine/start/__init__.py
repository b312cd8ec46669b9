# SPDX-License-Identifier: Apache-2.0
"""Runs before an engine does: options, refusals, what a pool holds, who may ask."""
