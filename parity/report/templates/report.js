"use strict";
// Draws every figure in the colours of the page, and again when the page turns dark or light.
const figures = JSON.parse(document.getElementById("figures").textContent);
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

function marginScale(trace) {
  // The limit is at 0: blue below it, red above, and a step between.
  const limit = -trace.zmin / (trace.zmax - trace.zmin);
  return [
    [0, colour("--cell-low")], [limit, colour("--cell-limit")],
    [limit, colour("--cell-over")], [1, colour("--cell-worst")],
  ];
}

function coloured(figure) {
  const narrow = window.innerWidth < 520;
  const mark = colour("--cell-mark");  // none in light: Plotly's choice of white or grey reads well there
  const roomFor = (columns) => !narrow || window.innerWidth > 36 * columns;
  const lines = [colour("--first"), colour("--second")];
  const data = figure.data.map((trace, number) => {
    if (trace.type !== "heatmap") {
      return { ...trace, line: { ...trace.line, color: lines[number], width: 2 },
               marker: { ...trace.marker, color: lines[number] } };
    }
    const isLoad = trace.zmin === 0;
    const scale = isLoad
      ? [[0, colour("--cell-limit")], [1, colour("--cell-low")]]
      : marginScale(trace);
    return { ...trace, colorscale: scale, showscale: trace.showscale !== false && !narrow,
             textfont: { size: narrow ? 9 : 11, ...(mark && !isLoad && { color: mark }) },
             text: isLoad && !roomFor(trace.x.length) ? [] : trace.text };
  });
  const axis = { gridcolor: colour("--rule"), linecolor: colour("--rule"), zeroline: false, automargin: true,
                 tickfont: { size: narrow ? 9 : 11 } };
  const heat = figure.data[0].type === "heatmap";
  const outline = { color: colour("--ink"), width: 3 };
  const layout = {
    ...figure.layout,
    shapes: (figure.layout.shapes || []).map((shape) => ({ ...shape, line: outline })),
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: colour(heat ? "--cell-gap" : "--ground"),
    font: { color: colour("--ink"), family: "system-ui, sans-serif", size: 12 },
    margin: { l: 8, r: 8, t: 8, b: 8 },
    xaxis: { ...axis, ...figure.layout.xaxis, showgrid: !heat, tickmode: heat ? "linear" : "auto", fixedrange: true },
    yaxis: { ...axis, ...figure.layout.yaxis, showgrid: !heat, fixedrange: true },
    hoverlabel: { bgcolor: colour("--raised"), bordercolor: colour("--rule"), align: "left",
                  font: { color: colour("--ink"), size: 13 } },
    dragmode: false,
  };
  return { data, layout };
}

function drawAll() {
  for (const [name, figure] of Object.entries(figures)) {
    const { data, layout } = coloured(figure);
    Plotly.react(name, data, layout, { displayModeBar: false, responsive: true });
  }
  document.documentElement.dataset.drawn = "yes";
}

drawAll();
window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
