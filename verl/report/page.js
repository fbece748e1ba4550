"use strict";
(() => {
  const root = document.documentElement, button = document.getElementById("theme");
  const themes = ["auto", "light", "dark"], names = { auto: "Auto", light: "Light", dark: "Dark" };
  const dashes = ["solid", "dash", "dot"];
  const data = JSON.parse(document.getElementById("charts").textContent);
  const charts = new Map(data.charts.map((chart) => [chart.metric, chart]));
  const coarse = matchMedia("(pointer: coarse)").matches, dark = matchMedia("(prefers-color-scheme: dark)");
  const drawn = new Map();

  const stored = (value) => {
    try { return value === undefined ? localStorage.getItem("verl-report-theme") : localStorage.setItem("verl-report-theme", value); }
    catch { return null; } // a page without storage, such as one in a frame
  };
  const setTheme = (theme) => {
    root.dataset.theme = theme;
    button.textContent = names[theme];
    button.setAttribute("aria-label", `Colours: ${theme === "auto" ? "as the system" : theme}`);
    for (const [element, log] of drawn) draw(element, log);
  };

  // The colour of a variable of the style sheet, as it is now.
  const color = (name) => {
    button.style.setProperty("outline-color", `var(${name})`);
    const found = getComputedStyle(button).outlineColor;
    button.style.removeProperty("outline-color");
    return found;
  };
  const isDark = () => root.dataset.theme === "dark" || (root.dataset.theme === "auto" && dark.matches);
  const faded = (hex, alpha) => `rgba(${[1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16)).join(",")},${alpha})`;
  const columns = (points) => ({ x: points.map((p) => p[0]), y: points.map((p) => p[1]) });

  const traces = (chart) => chart.curves.flatMap((curve) => {
    const colors = data.colors[isDark() ? "dark" : "light"];
    const ink = colors[curve.run % colors.length], dash = dashes[Math.floor(curve.run / colors.length) % dashes.length];
    const line = { color: ink, width: 2, dash }, name = data.runs[curve.run];
    if (curve.smooth === null) {
      const few = curve.points.length <= data.few_points;
      return [{ ...columns(curve.points), name, line, mode: few ? "lines+markers" : "lines", marker: { color: ink, size: 5 } }];
    }
    const faint = { color: faded(ink, 0.28), width: 1 };
    return [
      { ...columns(curve.points), name: `${name} (value)`, line: faint, mode: "lines" },
      { ...columns(curve.smooth), name, line, mode: "lines" },
    ];
  });

  const layout = (chart, log) => {
    const axis = { showspikes: false, gridcolor: color("--grid"), zeroline: false, linecolor: color("--line"), tickcolor: color("--line"), automargin: true };
    const hover = { bgcolor: color("--ground"), bordercolor: color("--line"), font: { color: color("--ink"), size: 12 }, namelength: 40 };
    const steps = chart.curves.flatMap((curve) => [curve.points[0][0], curve.points.at(-1)[0]]);
    const few = Math.max(...steps) - Math.min(...steps) < 6 ? { dtick: 1 } : { nticks: 6 }; // no step 1.5
    return {
      font: { family: getComputedStyle(document.body).fontFamily, size: 11.5, color: color("--quiet") },
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", margin: { l: 8, r: 14, t: 8, b: 8 }, showlegend: false,
      hovermode: "x unified", hoverlabel: hover, dragmode: coarse ? false : "zoom", autosize: true,
      xaxis: { ...axis, title: { text: "step", standoff: 4 }, ...few, hoverformat: ",d" },
      yaxis: { ...axis, title: { text: chart.unit, standoff: 6 }, nticks: 6, type: log ? "log" : "linear", hoverformat: ".4~g", exponentformat: "power", minexponent: 5, separatethousands: true },
    };
  };

  const draw = (element, log) => {
    const chart = charts.get(element.dataset.metric);
    drawn.set(element, log);
    return Plotly.react(element, traces(chart), layout(chart, log), { displayModeBar: false, responsive: true, doubleClick: "reset", showTips: false });
  };

  const addLog = (element) => {
    const chart = charts.get(element.dataset.metric), log = element.parentElement.querySelector(".log");
    log.hidden = !chart.curves.every((curve) => curve.points.every((point) => point[1] > 0));
    log.addEventListener("click", () => {
      const on = log.getAttribute("aria-pressed") !== "true";
      log.setAttribute("aria-pressed", String(on));
      draw(element, on);
    });
  };

  const show = (element) => {
    if (drawn.has(element)) return;
    draw(element, false);
    addLog(element);
  };

  // plotly.js is in the page as compressed text: a third of its size.
  const load = async () => {
    const packed = Uint8Array.from(atob(document.getElementById("library").textContent), (c) => c.charCodeAt(0));
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
    const script = document.createElement("script");
    script.textContent = await new Response(stream).text();
    document.head.append(script);
  };

  const start = async () => {
    const plots = [...document.querySelectorAll(".plot")];
    try {
      await load();
    } catch (error) {
      for (const plot of plots) {
        const text = document.createElement("div");
        text.className = "failed";
        text.textContent = "This browser is too old to draw the curves. verl report --png writes them as pictures.";
        plot.append(text);
      }
      return;
    }
    for (const plot of plots) if (!plot.closest("details:not([open])")) show(plot);
    for (const group of document.querySelectorAll("details.group")) {
      group.addEventListener("toggle", () => { if (group.open) group.querySelectorAll(".plot").forEach(show); });
    }
    dark.addEventListener("change", () => { for (const [element, log] of drawn) draw(element, log); });
    root.dataset.ready = "true";
  };

  const saved = stored();
  setTheme(themes.includes(saved) ? saved : "auto");
  button.addEventListener("click", () => {
    const next = themes[(themes.indexOf(root.dataset.theme) + 1) % themes.length];
    stored(next);
    setTheme(next);
  });
  start();
})();
