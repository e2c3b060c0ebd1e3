// Draw the diagrams of a page. A page without one loads nothing more. The theme turns them round where the page is dark.
(() => {
  const blocks = [...document.querySelectorAll("pre.mermaid")];
  if (!blocks.length) return;

  async function draw() {
    mermaid.initialize({ startOnLoad: false, theme: "neutral", fontFamily: getComputedStyle(document.body).fontFamily });
    for (const [i, block] of blocks.entries()) {
      block.innerHTML = (await mermaid.render(`diagram-${i}`, block.textContent)).svg;
      const svg = block.querySelector("svg");
      svg.style.minWidth = `${Math.min(svg.viewBox.baseVal.width, 560)}px`; // on a phone it scrolls, and can be read
    }
  }

  const script = document.createElement("script");
  script.src = `${document.documentElement.dataset.content_root}_static/mermaid.tiny.js`;
  script.onload = draw;
  document.head.append(script);
})();
