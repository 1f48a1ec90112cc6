// Under the pointer: the value of every line at the nearest recorded x.
for (const svg of document.querySelectorAll("svg[data-values]")) {
  const { x: name, lines } = JSON.parse(svg.dataset.values);
  const box = document.createElement("div");
  const rule = document.createElementNS("http://www.w3.org/2000/svg", "path");
  box.className = "values";
  box.hidden = true;
  rule.setAttribute("class", "pointer");
  svg.append(rule);
  svg.parentElement.append(box);
  const hide = () => { box.hidden = true; rule.removeAttribute("d"); };
  svg.addEventListener("pointerleave", hide);
  svg.addEventListener("pointermove", (event) => {
    const frame = svg.getBoundingClientRect();
    const at = (event.clientX - frame.left) / frame.width * svg.viewBox.baseVal.width;
    const near = (points) => points.reduce((a, b) => Math.abs(b[0] - at) < Math.abs(a[0] - at) ? b : a);
    const nearest = near(lines.map((line) => near(line.points)));
    const rows = lines.map((line) => [line.label, near(line.points)]).filter(([, point]) => Math.abs(point[0] - nearest[0]) < 3);
    box.replaceChildren(...[`${name} ${nearest[2]}`, ...rows.map(([label, point]) => `${label}: ${point[3]}`)].map((text) => {
      const row = document.createElement("div");
      row.textContent = text;
      return row;
    }));
    rule.setAttribute("d", `M${nearest[0]} 12V208`);
    box.hidden = false;
    const left = svg.offsetLeft ?? 0;
    box.style.top = "70px";
    const x = frame.left - svg.parentElement.getBoundingClientRect().left + nearest[0] / svg.viewBox.baseVal.width * frame.width;
    box.style.left = `${Math.max(left, x > frame.width / 2 ? x - box.offsetWidth - 10 : x + 10)}px`;
  });
}
