// Draws a LiveFigure of live.py, always from its whole state, and as wide as its place in the page.

const PREFIX = "IPY_MODEL_".length;
const HOVER_MS = 60; // plotly looks for the point under the pointer at most every 50 ms
const copies = (window.trtlabPlotly ??= new Map()); // plotly by its text: one copy for all figures of a page

function library(text) {
    if (!copies.has(text)) copies.set(text, load(text));
    return copies.get(text);
}

async function load(text) {
    const others = window.Plotly; // of another extension, perhaps in another version
    window.PlotlyConfig ??= {MathJaxConfig: "local"}; // leaves the page's MathJax as it is
    const address = URL.createObjectURL(new Blob([text], {type: "text/javascript"}));
    await import(address);
    URL.revokeObjectURL(address);
    const plotly = window.Plotly;
    window.Plotly = others;
    return plotly;
}

async function render({model, el}) {
    const state = await model.widget_manager.get_model(model.get("state").slice(PREFIX));
    const plotly = await library(state.get("plotly"));
    let frame = 0; // at most one picture for each of the screen's
    let still = false; // while plotly looks for the point that was clicked
    // A click comes with the point that plotly knew last: of quick hands, or on a busy page, the one before.
    const tell = ({points}) => {
        still = true;
        setTimeout(() => {
            const [{curveNumber, pointNumber}] = el._hoverdata ?? points;
            still = false;
            model.send([curveNumber, pointNumber]);
        }, HOVER_MS);
    };
    el.addEventListener("mousemove", event => still && event.stopPropagation(), {capture: true});
    const draw = () => {
        const width = el.clientWidth; // 0 while the page does not show it
        if (width === 0) return;
        const {data, layout} = structuredClone(state.get("figure"));
        const isNew = !el.classList.contains("js-plotly-plot");
        plotly.react(el, data, {...layout, width, uirevision: "keep what the reader hid"});
        if (isNew) el.on("plotly_click", tell);
    };
    const drawSoon = () => {
        cancelAnimationFrame(frame);
        frame = requestAnimationFrame(draw);
    };
    const watch = new ResizeObserver(drawSoon); // calls once at the start, when the place has its width
    watch.observe(el);
    state.on("change:figure", drawSoon);
    return () => {
        watch.disconnect();
        state.off("change:figure", drawSoon);
        cancelAnimationFrame(frame);
        plotly.purge(el);
    };
}

export default {render};
