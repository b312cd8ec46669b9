# SPDX-License-Identifier: Apache-2.0
"""Our test and benchmark on a real GPU; see README.md beside this file."""
