(() => {
  const GAP_X = 14, GAP_Y = 24, BEND = 6, PAD = 8, SWEEPS = 8, BOX_WEIGHT = 64;
  const number = (v) => Math.floor(v * 10 + 0.5) / 10;

  // As place() and _spread() in layout.py, step by step.
  const spread = (rank, widths, wanted, x) => {
    let offset = 0;
    const pools = [];
    const offsets = rank.map((item, i) => {
      if (i) offset += (widths[rank[i - 1]] + widths[item]) / 2 + GAP_X;
      return offset;
    });
    rank.forEach((item, i) => {
      let weight = widths[item] === BEND ? 1 : BOX_WEIGHT, total = (wanted[i] - offsets[i]) * weight, size = 1;
      while (pools.length && pools[pools.length - 1][0] / pools[pools.length - 1][1] > total / weight) {
        const before = pools.pop();
        total += before[0];
        weight += before[1];
        size += before[2];
      }
      pools.push([total, weight, size]);
    });
    let i = 0;
    for (const [total, weight, size] of pools)
      for (let k = 0; k < size; k++, i++) x[rank[i]] = total / weight + offsets[i];
  };
  const place = (group, sizes) => {
    const { ranks, wires, count } = group;
    const items = ranks.reduce((n, rank) => n + rank.length, 0);
    const widths = Array.from({ length: items }, (_, i) => (i < count ? sizes[i][0] : BEND));
    let above = Array.from({ length: items }, () => []), below = Array.from({ length: items }, () => []);
    for (const wire of wires)
      for (let i = 2; i < wire.length; i += 3) {
        above[wire[i + 1]].push(wire[i]);
        below[wire[i]].push(wire[i + 1]);
      }
    const alike = (neighbours) => neighbours.map((near, i) => {
      const same = near.filter((n) => (n < count) === (i < count));
      return same.length ? same : near;
    });
    above = alike(above);
    below = alike(below);
    let x = Array(items).fill(0);
    for (const rank of ranks) spread(rank, widths, rank.map(() => 0), x);
    for (let sweep = 0; sweep < SWEEPS; sweep++) {
      const near = sweep % 2 === 0 ? above : below;
      for (const rank of sweep % 2 === 0 ? ranks : [...ranks].reverse())
        spread(rank, widths, rank.map((i) =>
          near[i].length ? near[i].reduce((sum, n) => sum + x[n], 0) / near[i].length : x[i]), x);
    }
    const left = x.reduce((low, v, i) => Math.min(low, v - widths[i] / 2), Infinity);
    x = x.map((v) => v - (items ? left : 0));
    const heights = ranks.map((rank) => rank.reduce((h, i) => (i < count ? Math.max(h, sizes[i][1]) : h), 0));
    let height = 0;
    const tops = heights.map((tall) => { const top = height; height += tall + GAP_Y; return top; });
    const width = x.reduce((w, v, i) => Math.max(w, v + widths[i] / 2), 0);
    return { x, tops, heights, width, height: Math.max(0, height - GAP_Y) };
  };

  const start = (svg, records) => {
    const elements = [...svg.querySelectorAll("g.b")];
    const boxes = records.map((r, i) => ({
      element: elements[i], closed: [r[0], r[1]], group: r.length > 2, least: r[2], head: r[3],
      children: r[4] || [], ranks: r[5] || [], wires: r[6] || [], count: (r[4] || []).length,
    }));
    const isOpen = (box) => box.group && box.element.classList.contains("on");
    const measure = (box) => {
      box.size = box.closed;
      box.placed = null;
      if (isOpen(box)) {
        const sizes = box.children.map((i) => measure(boxes[i]));
        const p = (box.placed = place(box, sizes));
        box.size = [Math.max(p.width + 2 * PAD, box.least), p.height + box.head + PAD];
      }
      return box.size;
    };
    const shift = (box, port) => (port < 0 || !box.placed ? 0 : box.placed.x[port] - box.placed.width / 2);
    const path = (box, wire, rankOf, left) => {
      const p = box.placed;
      let d = "";
      for (let i = 2; i < wire.length; i += 3) {
        const [a, b, port] = wire.slice(i, i + 3);
        const upper = rankOf[a], lower = rankOf[b];
        const x1 = left + p.x[a] + (a < box.count ? shift(boxes[box.children[a]], wire[1]) : 0);
        const x2 = left + p.x[b] + (b < box.count ? shift(boxes[box.children[b]], port) : 0);
        const bottom = box.head + p.tops[upper] + p.heights[upper];
        const from = a < box.count ? box.head + p.tops[upper] + boxes[box.children[a]].size[1] : bottom;
        const end = box.head + p.tops[lower], middle = number((bottom + end) / 2);
        const [n1, n2, y] = [number(x1), number(x2), number(end)];
        d += `M${n1} ${number(from)}` + (bottom > from ? `V${number(bottom)}` : "");
        d += n1 === n2 ? `V${y}` : `C${n1} ${middle} ${n2} ${middle} ${n2} ${y}`;
        d += b >= box.count ? `V${number(end + p.heights[lower])}`
          : `M${number(x2 - 3)} ${number(end - 5)}L${n2} ${y}L${number(x2 + 3)} ${number(end - 5)}`;
      }
      return d;
    };
    const paint = (box) => {
      if (!isOpen(box)) return;
      const p = box.placed, left = (box.size[0] - p.width) / 2, rankOf = [];
      box.ranks.forEach((rank, r) => rank.forEach((item) => { rankOf[item] = r; }));
      const inside = box.element.querySelector(":scope > .open");
      const frame = inside.querySelector(":scope > rect.bg");
      frame.setAttribute("width", number(box.size[0]));
      frame.setAttribute("height", number(box.size[1]));
      box.children.forEach((index, i) => {
        const child = boxes[index];
        const x = left + p.x[i] - child.size[0] / 2, y = box.head + p.tops[rankOf[i]];
        child.element.setAttribute("transform", `translate(${number(x)} ${number(y)})`);
        paint(child);
      });
      const lines = inside.querySelector(":scope > .w").children;
      box.wires.forEach((wire, i) => lines[i].setAttribute("d", path(box, wire, rankOf, left)));
    };
    const update = () => {
      measure(boxes[0]);
      paint(boxes[0]);
      const [w, h] = boxes[0].size.map(number);
      svg.setAttribute("width", w);
      svg.setAttribute("height", h);
      svg.setAttribute("viewBox", `0 0 ${w} ${h}`);
    };
    const groups = boxes.filter((box, i) => box.group && i);
    const set = (wanted) => {
      for (const box of groups) {
        const on = wanted(box.element.dataset.k, isOpen(box));
        box.element.classList.toggle("on", on);
      }
      update();
    };
    return { groups, isOpen, set };
  };

  const begin = (report) => {
    if (!report || report.dataset.ready) return;
    report.dataset.ready = "1";
    const sides = [...report.querySelectorAll("[data-tree]")].map((side) =>
      start(side.querySelector("svg"), JSON.parse(side.dataset.tree)));
    const toggle = (key, on) => sides.forEach((side) => side.set((k, now) => (k === key ? on : now)));
    for (const side of sides)
      for (const box of side.groups) {
        const key = box.element.dataset.k;
        for (const part of box.element.querySelectorAll(":scope > .face, :scope > .open > .head"))
          part.addEventListener("click", () => toggle(key, !side.isOpen(box)));
      }
    for (const button of report.querySelectorAll("button[data-all]")) {
      button.hidden = false;
      button.addEventListener("click", () => sides.forEach((side) => side.set(() => button.dataset.all === "open")));
    }
  };
  const here = document.currentScript && document.currentScript.previousElementSibling;
  (here ? [here] : document.querySelectorAll(".mqfx-draw")).forEach(begin);
})();
