// What the theme makes in the browser, for the keyboard and for screen readers: boxes that scroll can be reached, copy
// buttons are told apart.
function reach() {
  for (const box of document.querySelectorAll('.md-typeset__scrollwrap, .md-typeset__table, .output, .output pre > code'))
    if (box.scrollWidth > box.clientWidth) box.tabIndex = 0
  document.querySelectorAll('.md-code__nav').forEach((nav, i) => nav.setAttribute('aria-label', `Code block ${i + 1}`))
}

new MutationObserver(reach).observe(document.body, {childList: true, subtree: true})
addEventListener('resize', reach)
reach()
