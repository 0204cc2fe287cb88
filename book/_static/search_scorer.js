/* What the search puts first: a page, and then a section, with all words of the query in its title. Sphinx gives a page
   the weight of its best word alone, so that for "own model" every page with a section such as "Your own copy" weighed as
   much as the page "Your own model". This becomes a part of the built book's language_data.js (html_search_scorer in
   _config.yml), where Sphinx looks for the name Scorer; the weights up to `partialTerm` are its own. */
var Scorer = {
  objNameMatch: 11,
  objPartialMatch: 6,
  objPrio: { 0: 15, 1: 5, 2: -5 },
  objPrioDefault: 0,
  title: 15,
  partialTitle: 7,
  term: 5,
  partialTerm: 2,
  wholeQueryInPage: 20,
  wholeQueryInSection: 10,

  stems(text) {
    const words = splitQuery(text.toLowerCase()).filter((word) => ![...stopwords].includes(word));
    return words.map((word) => new Stemmer().stemWord(word));
  },

  score([, title, , , score]) {
    const asked = Scorer.stems(new URLSearchParams(location.search).get("q") ?? "");
    const hasAll = (part) => asked.length > 0 && asked.every((word) => Scorer.stems(part).includes(word));
    const [page, ...section] = title.split(" > ");
    if (hasAll(page)) return score + Scorer.wholeQueryInPage;
    return score + (hasAll(section.join(" ")) ? Scorer.wholeQueryInSection : 0);
  },
};
