// Say how an answer from few tokens compares with one from all of them.

/** Show the ratios of two answers, and whether they say the same. */
export function showRatio(place, few, all, shared) {
  const ratios = [
    ["first", "first token", all.firstMs / few.firstMs, "sooner", "later"],
    ["whole", "whole answer", all.wholeMs / few.wholeMs, "sooner", "later"],
    ["read", "tokens read", all.usage.prompt_tokens / few.usage.prompt_tokens, "fewer", "more"],
  ];
  const figures = document.createElement("dl");
  figures.className = "figures";
  figures.append(...ratios.map(([name, words, ratio, better, worse]) => {
    const pair = document.createElement("div");
    const dt = document.createElement("dt");
    const dd = document.createElement("dd");
    const factor = ratio >= 1 ? ratio : 1 / ratio;
    dt.textContent = words[0].toUpperCase() + words.slice(1);
    dd.textContent = `${factor.toFixed(factor < 10 ? 1 : 0)}× ${ratio >= 1 ? better : worse}`;
    dd.dataset.ratio = name;
    pair.append(dt, dd);
    return pair;
  }));
  const said = document.createElement("p");
  said.className = "said";
  said.textContent = few.text === all.text ? "Both say the same." : "They say different things.";
  if (shared) {
    said.textContent += " Both ran at once and shared the machine; “In turn” times each alone.";
  }
  place.replaceChildren(figures, said);
  place.hidden = false;
}
