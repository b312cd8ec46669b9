// SPDX-License-Identifier: Apache-2.0
// Numbers as people read them.

export const number = (value) => value >= 10000
  ? new Intl.NumberFormat("en", { notation: "compact", maximumFractionDigits: 1 }).format(value)
  : new Intl.NumberFormat("en", { maximumFractionDigits: value < 10 ? 1 : 0 }).format(value);

export const bytes = (value) => {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  for (; value >= 1000 && unit < units.length - 1; unit++) value /= 1024;
  return `${value < 10 && unit ? value.toFixed(1) : Math.round(value)} ${units[unit]}`;
};
export const seconds = (value) => value >= 1 ? `${value.toFixed(value < 10 ? 2 : 1)} s` : `${(value * 1000).toFixed(0)} ms`;
export const percent = (value) => `${(value * 100).toFixed(value && value < 0.1 ? 1 : 0)} %`;
