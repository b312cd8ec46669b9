# SPDX-License-Identifier: Apache-2.0
"""All that differs between a CPU and a GPU; `hardware` chooses."""
