// Draw which patches of a picture became tokens.

const SVG = "http://www.w3.org/2000/svg";

/** Return what became of each patch: "kept", "target" (it stands for a group), "merged" or "dropped". */
export function fatesOf(seen) {
  const kept = new Set(seen.kept.map(([row, column]) => row * seen.patch_columns + column));
  return seen.assignment.map((slot, patch) => {
    if (slot >= 0) return kept.has(patch) ? "kept" : "target";
    return slot < -1 ? "merged" : "dropped";
  });
}

/** Draw the patches into an SVG element that lies over the picture. */
export function drawPatches(svg, seen) {
  const [top, left, bottom, right] = seen.box;
  const height = (bottom - top) / seen.patch_rows;
  const width = (right - left) / seen.patch_columns;
  const veils = { merged: "", dropped: "" };
  const marks = [];
  fatesOf(seen).forEach((fate, patch) => {
    const x = left + (patch % seen.patch_columns) * width;
    const y = top + Math.floor(patch / seen.patch_columns) * height;
    if (fate in veils) veils[fate] += `M${x} ${y}h${width}v${height}h${-width}z`;
    else marks.push(element("rect", { class: fate, x, y, width, height }));
  });
  const outside = `M0 0H${seen.width}V${seen.height}H0zM${left} ${top}H${right}V${bottom}H${left}z`;
  svg.setAttribute("viewBox", `0 0 ${seen.width} ${seen.height}`);
  svg.replaceChildren(
    element("path", { class: "outside", d: outside }),
    ...Object.entries(veils).map(([fate, d]) => element("path", { class: fate, d })),
    ...marks,
  );
}

/** Return the legend: how many tokens there are, and how many patches became what. */
export function legendOf(seen) {
  const counts = {};
  for (const fate of fatesOf(seen)) counts[fate] = (counts[fate] ?? 0) + 1;
  const { kept = 0, target = 0, merged = 0, dropped = 0 } = counts;
  const whole = seen.visual_tokens - kept - target; // such as the class token
  return [
    ["tokens", seen.visual_tokens, `visual tokens from ${seen.assignment.length} patches`],
    ["kept", kept, "kept"],
    ["target", target, "stand for a group"],
    ["merged", merged, "merged"],
    ["dropped", dropped, "dropped"],
    ["whole", whole, seen.views ? "of the whole view, merged, or newlines" : "of no single patch"],
  ].filter(([, count]) => count > 0).map(([fate, count, words]) => ({ fate, count, words }));
}

function element(name, attributes) {
  const made = document.createElementNS(SVG, name);
  for (const [attribute, value] of Object.entries(attributes)) made.setAttribute(attribute, value);
  return made;
}
